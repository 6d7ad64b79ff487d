"""Whole runs in one service: answers and scores are those of each run alone."""

import io
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import one_block
import pytest
import recipes
import small_llama
import tiny
from json_files import write_rows
from refusals import refused, told

import lorafusion_jax as lf
from lorafusion_jax import cli
from lorafusion_jax.loading.model import digests
from lorafusion_jax.methods import find
from lorafusion_jax.runs import predict
from lorafusion_jax.runs.options import row_format
from lorafusion_jax.serving.predict import generate_rows
from lorafusion_jax.tasks import draw_modules, load_task

_TASK = one_block.SMALL / "tasks" / "double_digit"
_SITES = (
    "encoder.self.q",
    "encoder.self.v",
    "decoder.self.q",
    "decoder.self.v",
    "decoder.cross.q",
    "decoder.cross.v",
)
_SCALED = (
    "encoder.self.v",
    "encoder.ff.wo",
    "decoder.self.v",
    "decoder.ff.wo",
    "decoder.cross.v",
)
# seeds that draw modules 1 and 3, 2 and 0
_MIXED = 4
_OTHER = 7
_LINES = [
    "double then digit : a b c",
    "reverse then upper : d e",
    "sort then next : c b a d",
]


@pytest.fixture(scope="module")
def write(small, tmp_path_factory):
    """Write a run with made-up numbers, as `fuse` writes one."""
    names = sorted(folder.name for folder in small[1].iterdir())

    def write_run(name, params, seeds, **changes):
        values = {
            "base": str(small[0]),
            "pool": str(small[1]),
            "task": str(_TASK),
            "seeds": seeds,
        }
        options = recipes.options(
            {"modules": 2}, **values | {"test_rows": 6, "train_rows": 20} | changes
        )
        fuses = find(options.method).pool
        drawn = [
            (options.adapters or draw_modules(names, 2, seed)) if fuses else ()
            for seed in seeds
        ]
        task = load_task(
            options.task, **row_format(options), train_rows=options.train_rows, need=()
        )
        config = recipes.run_config(options, modules=drawn, task_sha256=task.sha256)
        config["max_new_tokens"] = options.recipe.max_new_tokens or 8
        config["digests"] = digests(lf.loading.load_model(options))
        folder = tmp_path_factory.mktemp("runs") / name
        folder.mkdir()
        lf.runs.RunFolder(folder).write_config(config)
        lf.io.save_arrays(
            folder / "final",
            "training result",
            params,
            {"steps": [1] * len(seeds), "seconds": 0.0},
        )
        return folder

    return write_run


@pytest.fixture(scope="module")
def runs(small, write, tmp_path_factory):
    """A fusion with two seeds, a mix, and magnitudes alone: other modules, granularities, tasks and prompts."""
    asked = [
        {"input": f"Say {x}.\nOptions:\n- a\n- b", "target": "ab"[i % 2]}
        for i, x in enumerate("uvwxyz")
    ]
    closed = tmp_path_factory.mktemp("tasks") / "closed.jsonl"
    write_rows(closed, asked)
    rng = np.random.default_rng(0)
    norms = {
        site: np.linalg.norm(kernel, axis=1)
        for site, kernel in lf.kernels(lf.load_base(small[0])).items()
    }

    def magnitudes(sites, seeds):
        return {
            s: (rng.uniform(0.7, 1.3, (seeds, *norms[s].shape)) * norms[s]).astype(
                np.float32
            )
            for s in sites
        }

    fused = {
        "coefficients": np.asarray(tiny.coefficients((2, 2, 2))),
        "magnitudes": magnitudes(_SITES, 2),
    }
    mixed = {"coefficients": np.asarray(tiny.coefficients((1, 2, len(_SITES))))}
    return {
        "fused": write("fused", fused, (1, 2), max_new_tokens=6),
        "mixed": write(
            "mixed",
            mixed,
            (_MIXED,),
            method="coefficients",
            composition="mix",
            granularity="site",
            max_new_tokens=6,
            task=str(closed),
            train_rows=1,
        ),
        "scaled": write(
            "scaled",
            {"magnitudes": magnitudes(_SCALED, 1)},
            (1,),
            method="magnitudes",
            lora_targets=("v", "wo"),
            max_new_tokens=3,
            prompt="{input}.",
        ),
    }


@pytest.fixture(scope="module")
def service(runs):
    found = [lf.FusedRun.read(folder) for folder in runs.values()]
    service = lf.Service(found, capacity=3)
    for name, run in zip(runs, found, strict=True):
        service.add(name, run)
    return service


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A function that returns the answers of one run to the lines."""
    file = tmp_path_factory.mktemp("lines") / "lines"
    file.write_text("\n".join(_LINES))
    return lambda folder: recipes.generate(run=folder, file=file)


@pytest.fixture(scope="module")
def alone(runs, answers):
    """The answers of each run on its own."""
    return {name: answers(folder) for name, folder in runs.items()}


def _file(folder, rows):
    (folder / "rows.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    )
    return folder / "rows.jsonl"


def test_every_row_is_answered_as_by_its_run_alone(
    runs, alone, small, tmp_path, capsys
):
    """By name or by folder, in batches smaller than the file; the plain base answers a row without a run."""
    asked = [
        (name, i) for i in range(len(_LINES)) for name in ("mixed", "fused", "scaled")
    ]
    rows = [{"run": name, "input": _LINES[i]} for name, i in asked]
    rows[0]["run"] = str(runs["mixed"])
    folders = [str(folder) for folder in runs.values()]
    # Some marks end lines elsewhere, and not in a file of rows.
    nothing = {
        "mixture": {min(folder.name for folder in small[1].iterdir()): 0.0}
    }  # answers as the base does
    file = _file(
        tmp_path,
        [
            *rows,
            {"input": _LINES[0]},
            nothing | {"input": _LINES[0]},
            {"input": "a\u2028b\x85c"},
        ],
    )
    file.write_text(file.read_text(), encoding="utf-8-sig")
    cli.main(["generate", "--runs", *folders, *f"--file {file} --eval-batch 4".split()])
    printed = capsys.readouterr().out.split("\n")
    assert (
        printed[: len(asked)] == [alone[name][i] for name, i in asked]
        and len(printed) == len(asked) + 4
    )
    assert printed[len(asked)] == printed[len(asked) + 1]
    assert len({*printed[:3], printed[len(asked)]}) > 2


def test_a_model_that_continues_its_prompt_answers_chats_and_prompts_in_one_batch(
    write, tmp_path
):
    base = small_llama.make(tmp_path / "base")
    rng = np.random.default_rng(0)
    magnitudes = {}
    targets = ("q_proj", "o_proj", "down_proj")
    for site, kernel in lf.kernels(lf.load_base(base)).items():
        if site.endswith(targets):
            norm = np.linalg.norm(kernel, axis=1)[None]
            magnitudes[site] = (rng.uniform(0.3, 3, norm.shape) * norm).astype(
                np.float32
            )
    prompts = {
        "chat": {"chat": True, "max_new_tokens": 6},
        "asked": {"prompt": "Q: {input}\nA:", "max_new_tokens": 4},
    }
    values = {"base": str(base), "pool": None, "method": "magnitudes"}
    folders = []
    rows = []
    alone = []
    (tmp_path / "lines").write_text("hot\nthe tall")
    for name, prompt in prompts.items():
        changes = values | prompt | {"lora_targets": targets}
        folders.append(write(name, {"magnitudes": magnitudes}, (1,), **changes))
        rows += [{"run": name, "input": line} for line in ("hot", "the tall")]
        alone += recipes.generate(run=folders[-1], file=tmp_path / "lines")
    said = generate_rows(folders, file=_file(tmp_path, rows))
    assert said == alone and len(set(said)) == len(said)


def test_a_run_is_merged_into_plain_weights_for_long_answers_to_the_same_tokens(
    service, runs, tmp_path, monkeypatch
):
    """100 lines; the service keeps its adapters. The base is so small that merging pays from the second token on."""
    merged = []
    lines = [f"sort then next : {a} {b}" for a in "abcdefghij" for b in "klmnopqrst"]
    monkeypatch.setattr(
        predict, "merged_base", lambda *of: merged.append(1) or lf.merged_base(*of)
    )
    (tmp_path / "lines").write_text("\n".join(lines))
    (tmp_path / "short").write_text("a")
    options = lf.runs.GenerateOptions(run=runs["fused"], file=tmp_path / "lines")
    assert lf.runs.generate_lines(options) == service.generate(lines, ["fused"] * 100)
    assert len(merged) == 1
    first = "".join(next(lf.runs.stream_lines(replace(options, max_new_tokens=60))))
    assert (
        len(merged) == 2
        and first == service.generate(lines[:1], ["fused"], max_new_tokens=60)[0]
    )
    short = replace(options, file=tmp_path / "short", max_new_tokens=1)
    lf.runs.generate_lines(short)
    assert len(merged) == 2


def test_a_run_whose_prompt_names_columns_answers_rows_with_them(
    write, small, answers, tmp_path
):
    """As another run answers the filled prompts: in `generate --run`, `generate --runs` and a service."""
    params = {"coefficients": np.asarray(tiny.coefficients((1, 2, 2)))}
    write_coefficients = partial(write, method="coefficients", max_new_tokens=6)
    plain = write_coefficients("plain", params, (_MIXED,))
    texts = [line.split(" : ") for line in _LINES]
    rows = [{"how": way, "letters": letters, "mark": ""} for way, letters in texts]
    named = write_coefficients(
        "named",
        params,
        (_MIXED,),
        prompt="{how} : {letters}{mark}",
        task=str(_file(tmp_path, [row | {"target": "a"} for row in rows])),
        train_rows=1,
    )
    alone = lf.runs.GenerateOptions(run=named, file=_file(tmp_path, rows))
    assert (
        lf.runs.generate_lines(alone)[:-1]
        == ["".join(said) for said in lf.runs.stream_lines(alone)][:-1]
        == answers(plain)
    )
    run = lf.FusedRun.read(named)
    service = lf.Service([run], capacity=1)
    service.add("named", run)
    assert service.generate(rows, ["named"] * 3) == answers(plain)
    for row, message in (
        ("a b", 'is a text: .*{"how": "some text", "let'),
        ({}, "has no column how"),
    ):
        with refused(f"^text 1 {message}"):
            service.generate([row], ["named"])
    assert generate_rows(
        (named,), file=_file(tmp_path, [{"run": "named"} | row for row in rows])
    ) == answers(plain)
    for row, message in (
        ('{"run": "named", "how": "a"}', "no column letters"),
        ("a b", "not JSON"),
        ("[]", "got `array`"),
    ):
        alone.file.write_text(row)
        for generate in (
            lambda: lf.runs.generate_lines(alone),
            lambda: generate_rows((named,), file=alone.file),
        ):
            with refused(f"(line 1|rows.jsonl:1).*{message}"):
                generate()


@pytest.mark.long
def test_several_runs_are_evaluated_as_each_of_them_alone(runs, capsys):
    alone = {name: recipes.evaluate(run=runs[name]) for name in ("fused", "mixed")}
    rows = [
        {"run": str(runs[name]), **row}
        for name, of_run in alone.items()
        for row in of_run
    ]
    cli.main(["evaluate", "--runs", str(runs["fused"]), str(runs["mixed"])])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "task", "seed", "exact", "match", "%", "loss"]
    wanted = [
        [r["run"], str(r["seed"]), f"{r['exact_match']:.1f}", f"{r['loss']:.4f}"]
        for r in rows
    ]
    assert [[run, *scores] for run, task, *scores in map(str.split, lines)] == wanted
    assert [line.split()[1] for line in lines] == [_TASK.name, _TASK.name, "closed"]


def test_tasks_are_added_replaced_and_removed_by_name(runs, service, alone, caplog):
    fused = lf.FusedRun.read(runs["fused"])
    mixed = lf.FusedRun.read(runs["mixed"])
    before = service.generate(_LINES * 2, ["fused"] * 3 + ["mixed"] * 3)
    assert service.generate(_LINES * 2, ["mixed"] * 6) == alone["mixed"] * 2
    assert before == alone["fused"] + alone["mixed"]
    with refused(
        "no room for another: the bank holds 3 tasks, its capacity. Remove one"
    ):
        service.add("another", mixed)
    service.remove("scaled")
    service.add("another", mixed)
    service.add("fused", fused, seed=2)
    with jax.log_compiles():
        after = service.generate(_LINES * 2, ["another"] * 3 + ["mixed"] * 3)
        assert after == alone["mixed"] * 2
        assert service.generate(_LINES * 2, ["fused"] * 3 + ["mixed"] * 3) != before
        service.add("fused", fused)
        assert service.generate(_LINES * 2, ["fused"] * 3 + ["mixed"] * 3) == before
    assert "Compiling" not in caplog.text
    draw = lf.Sampling(temperature=1.0)
    for wrong, message in (
        (
            lambda: service.generate(["a"], ["scaled"]),
            "no task 'scaled': there are fused, mixed, another",
        ),
        (lambda: service.remove("scaled"), "no task 'scaled': there are"),
        (lambda: service.generate(["a", "b"], ["mixed"]), "2 texts and 1 names"),
        (
            lambda: service.add_mixture("fused", {"a": 1.0}),
            "'fused' is the name of a run",
        ),
        (lambda: service.add("fused", fused, seed=7), "has no seed 7: it has 1, 2"),
        (lambda: service.generate(["a"], [None], eval_batch=0), "eval_batch is "),
        (
            lambda: service.generate(["a"], [None], sampling=draw, sampling_seed=-1),
            "sampling_seed is ",
        ),
    ):
        with refused(message):
            wrong()


def test_draws_depend_on_the_row_and_not_on_the_tasks_of_other_rows(service):
    names = [*service.tasks][:2]

    def said(of_first, of_others, seed=0):
        return service.generate(
            _LINES * 2,
            [of_first, *[of_others] * 5],
            sampling=lf.Sampling(temperature=2.0),
            sampling_seed=seed,
            max_new_tokens=6,
        )

    first, *others = said(names[0], names[1])
    assert said(names[0], names[1]) == [first, *others]
    assert (
        said(names[0], names[0])[0] == first and said(names[0], names[0])[1:] != others
    )
    assert said(names[0], names[1], seed=1) != [first, *others]
    assert others[2] != first  # the same text


def test_a_run_whose_modules_were_not_loaded_needs_them_from_the_start(
    runs, small, write
):
    other = lf.FusedRun.read(
        write(
            "other",
            {"coefficients": np.ones((1, 2, 2), np.float32)},
            (_OTHER,),
            method="coefficients",
        )
    )
    mixed = lf.FusedRun.read(runs["mixed"])
    names = sorted(folder.name for folder in small[1].iterdir())
    service = lf.Service([mixed], capacity=1)
    with refused("other fuses .*, which the bank lacks: give these modules"):
        service.add("other", other)
    roomy = lf.Service([mixed], capacity=1, modules=names)
    roomy.add("other", other)
    assert roomy.bank.frozen.pool.names == tuple(names)
    with refused("lacks nobody: give the pool of the runs"):
        lf.Service([mixed], capacity=1, modules=["nobody"])


def test_runs_of_one_bank_share_base_pool_and_precision(runs, small, write, tmp_path):
    mixed = lf.FusedRun.read(runs["mixed"])
    scaled = lf.FusedRun.read(runs["scaled"])
    shutil.copytree(small[0], tmp_path / "base")
    shutil.copytree(small[1], tmp_path / "pool")
    one = {"coefficients": np.ones((1, 2, 2), np.float32)}
    changes = {name: str(tmp_path / name) for name in ("base", "pool")}
    changes |= {"control": "random-factors", "load_in": "nf4"}
    for field, value in changes.items():
        other = lf.FusedRun.read(
            write(
                f"other_{field}",
                one,
                (_OTHER,),
                method="coefficients",
                **{field: value},
            )
        )
        with refused(f"has the {field} {value}, and .*mixed has .*Serve them apart"):
            lf.Service([mixed, other], capacity=2)
    # Magnitudes alone come from no pool.
    lf.Service(
        [
            scaled._replace(options=replace(scaled.options, pool=None)),
            mixed,
        ],
        capacity=2,
    )
    with refused("no runs: give at least one"):
        lf.Service([], capacity=1)
    vera = write("vera", {"vera": {"b": np.ones(1)}}, (1,), method="vera")
    with refused(
        "vera is of the method vera, which no bank holds: give runs of a fusion"
    ):
        lf.FusedRun.read(vera)


def test_a_control_is_served_as_it_answers_alone(write, answers, tmp_path):
    params = {"coefficients": np.full((1, 2, 2), 3, np.float32)}
    folder = write(
        "control", params, (_MIXED,), method="coefficients", control="random-factors"
    )
    rows = [{"run": "control", "input": line} for line in _LINES]
    assert generate_rows((folder,), file=_file(tmp_path, rows)) == answers(folder)


def test_runs_whose_modules_adapt_other_matrices_are_served_together(
    small, write, answers, tmp_path
):
    """Modules 1 and 3 adapt queries alone; the run that mixes them has coefficients for no others."""
    pool = tmp_path / "pool"
    shutil.copytree(small[1], pool)
    for folder in sorted(pool.iterdir())[1::2]:
        one_block.change_tensors(
            folder, lambda tensors: {n: tensors[n] for n in tensors if ".v." not in n}
        )
    folders = []
    for seed, last in ((_MIXED, "q"), (_OTHER, "qv")):
        columns = len([site for site in _SITES if site[-1] in last])
        params = {"coefficients": 2 * np.asarray(tiny.coefficients((1, 2, columns)))}
        folder = write(
            last,
            params,
            (seed,),
            granularity="site",
            pool=str(pool),
            method="coefficients",
        )
        folders.append(folder)
    rows = [
        {"run": folder.name, "input": line} for folder in folders for line in _LINES
    ]
    wanted = [answer for folder in folders for answer in answers(folder)]
    assert generate_rows(folders, file=_file(tmp_path, rows)) == wanted


def test_rows_files_and_options_that_cannot_be_used_are_refused(
    runs, alone, tmp_path, capsys, monkeypatch
):
    """Two runs whose folders have the same last name differ by their paths, but a run cannot be given twice."""
    for row, message in (
        (
            {"run": "nobody", "input": "a"},
            "names the run 'nobody': expected one of fused, mixed, scaled",
        ),
        (
            {"run": "fused", "mixture": {"a": 1}},
            "has a run and a mixture: leave one of them out",
        ),
        ({"run": "fused", "input": " "}, ": its input is ' ': give it a text"),
        ([], ": Expected `object`, got `array`: give a row such as"),
    ):
        with refused(f"rows.jsonl:1.*{message}"):
            generate_rows(tuple(runs.values()), file=_file(tmp_path, [row]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("not JSON"))
    with refused("standard input:1: not JSON"):
        generate_rows((runs["mixed"],))
    (tmp_path / "empty").write_text("\n")
    with refused("empty holds no text: give a line for each answer"):
        generate_rows((runs["mixed"],), file=tmp_path / "empty")
    shutil.copytree(runs["mixed"], tmp_path / "fused")
    folders = (runs["fused"], tmp_path / "fused")
    rows = [{"run": str(folder), "input": _LINES[0]} for folder in folders]
    answers = generate_rows(folders, file=_file(tmp_path, rows))
    assert answers == [alone["fused"][0], alone["mixed"][0]]
    monkeypatch.chdir(runs["mixed"])
    for other in (runs["mixed"], Path(), Path("final", "..")):
        with refused("a run is given twice"):
            generate_rows((runs["mixed"], other))
    with refused(f"names the run 'none': expected one of {runs['mixed'].name}"):
        generate_rows((Path(),), file=_file(tmp_path, [{"run": "none", "input": "a"}]))
    mixed = runs["mixed"]
    for command, message in (
        ("evaluate --task t", "give a run with --run, several with --runs, or"),
        (f"generate --run {mixed} --runs {mixed}", "--run: not possible together with"),
    ):
        assert message in told(capsys, command.split())
