"""Mixtures of modules with typed weights, without any run: `Service.open`, `generate` and `evaluate` with a pool."""

import json

import jax
import numpy as np
import one_block
import pytest
import recipes
import small_llama
from json_files import write_json, write_rows
from numpy.testing import assert_array_equal
from refusals import refused, told

import lorafusion_jax as lf
from lorafusion_jax import cli, runs
from lorafusion_jax.serving.predict import generate_rows

_LINES = [
    "double then digit : a b c",
    "reverse then upper : d e",
    "sort then next : c b a d",
]


@pytest.fixture(scope="module")
def names(small):
    return sorted(folder.name for folder in small[1].iterdir())


@pytest.fixture(scope="module")
def blocks(names):
    return {names[0]: 3.0, names[1]: {"encoder.0": -2.0, "decoder.0": 4.0}}


@pytest.fixture(scope="module")
def merged(small, blocks, tmp_path_factory):
    """The answers of the model that `merge` writes for a mixture."""
    folder = tmp_path_factory.mktemp("merged")
    write_json(folder / "weights.json", blocks)
    (folder / "lines").write_text("\n".join(_LINES))
    weights = folder / "weights.json"
    command = f"merge {_pool(small)} --weights-file {weights} --format merged"
    cli.main(f"{command} --out {folder / 'model'}".split())
    return recipes.generate(base=str(folder / "model"), file=folder / "lines")


@pytest.fixture(scope="module")
def service(small, names, blocks):
    service = lf.Service.open(*map(str, small), modules=names[:2], capacity=3)
    service.add_mixture("blocks", blocks)
    service.add_mixture("zero", {names[0]: 0.0, names[1]: 0.0})
    return service


def _pool(small):
    return f"--base {small[0]} --pool {small[1]}"


def _rows(folder, rows):
    write_rows(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


def test_mixtures_answer_as_the_merged_model_and_zeros_as_the_base(
    service, small, merged, blocks, tmp_path
):
    rows = [{"mixture": blocks, "input": line} for line in _LINES] + [
        {"input": line} for line in _LINES
    ]
    base = service.generate(_LINES, [None] * 3)
    assert (
        generate_rows(
            base=str(small[0]),
            pool=str(small[1]),
            file=_rows(tmp_path, rows),
            max_new_tokens=128,
        )
        == merged + base
    )
    assert service.generate(_LINES * 2, ["blocks"] * 3 + ["zero"] * 3) == merged + base
    assert merged != base == service.generate(_LINES, [None] * 3)
    ids = np.tile(np.arange(3, 9, dtype=np.int32), (2, 1))
    batch = lf.Batch(ids, np.ones((2, 6), bool), ids, np.ones(2, bool))
    zeros, plain = service.bank.logits(
        batch, np.array([service.tasks["zero"].number, -1], np.int32)
    )
    assert_array_equal(zeros, plain)


def test_other_weights_and_modules_compile_nothing(service, names, caplog):
    def answers(weights):
        service.add_mixture("new", weights)
        return service.generate(_LINES, ["new"] * 3)

    first = answers({names[0]: 2.0})
    with jax.log_compiles():
        other = answers({names[1]: -1.5})
        assert answers({names[0]: 2.0, names[1]: 0.0}) == first != other
    assert "Compiling" not in caplog.text


def test_mixtures_have_the_prompt_or_the_chat_template_of_the_service(
    small, names, merged, blocks, tmp_path, capsys
):
    how, text = _LINES[0].split(" : ")
    rows = _rows(tmp_path, [{"mixture": blocks, "how": how, "text": text}])
    command = f"generate {_pool(small)} --file {rows}".split()
    cli.main([*command, "--prompt", "{how} : {text}"])
    assert capsys.readouterr().out.rstrip("\n") == merged[0]
    base = small_llama.make(tmp_path / "base")
    (tmp_path / "lines").write_text("hot")
    options = runs.GenerateOptions(
        base=str(base), file=tmp_path / "lines", chat=True, max_new_tokens=8
    )
    alone = runs.generate_lines(options)
    options = lf.LoadOptions(base=str(base), method="zero-shot", chat=True)
    chat = lf.Service((), capacity=1, options=options)
    assert chat.generate(["hot"], [None], max_new_tokens=8) == alone


def test_evaluate_scores_a_mixture_as_the_merged_model(small, names, tmp_path, capsys):
    mixture = f"{_pool(small)} --weights {names[1]}=3 {names[0]}=-1"
    model = tmp_path / "model"
    cli.main(f"merge {mixture} --format merged --out {model}".split())
    options = lf.FuseOptions(
        base=str(model), method="zero-shot", task=str(recipes.TASK), test_rows=4
    )
    setup = runs.load_setup(options, to_train=False)
    loss = float(runs.evaluate(setup, {}, batch_size=4).loss[0])
    capsys.readouterr()
    cli.main(f"evaluate {mixture} --test-rows 4 --task {recipes.TASK}".split())
    assert capsys.readouterr().out.split()[-1] == f"{loss:.4f}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"run": "r", "mixture": {"a": 1}},
            "names the run 'r': expected one of none without --runs",
        ),
        (
            {"mixture": {}},
            "has an empty mixture: give the weight of at least one module",
        ),
        ({"mixture": {"nobody": 1}}, "has no module nobody: it has "),
        (
            {"mixture": {"NAME": "a"}},
            "Expected `float .*`, got `str`.*: give weights such as",
        ),
        ({"mixture": [1]}, "mixture: Expected `object`, got `array`"),
        (
            {"mixture": {"NAME": {"encoder.7": 1}}},
            "name a block 'encoder.7': expected one of encoder.0",
        ),
    ],
)
def test_rows_that_cannot_be_answered_are_refused_with_their_line(
    small, names, row, message, tmp_path
):
    text = (
        json.dumps({"input": "a"})
        + "\n"
        + json.dumps({"input": "a"} | row).replace("NAME", names[0])
    )
    (tmp_path / "rows.jsonl").write_text(text)
    with refused(f"rows.jsonl:2.*{message}"):
        generate_rows(
            base=str(small[0]), pool=str(small[1]), file=tmp_path / "rows.jsonl"
        )


@pytest.fixture
def dora(small, names, tmp_path):
    """A pool of one DoRA adapter."""
    one_block.copy_as_dora(small[1] / names[0], tmp_path / "pool" / "dora")
    return tmp_path / "pool"


def test_a_mixture_of_a_dora_adapter_has_its_magnitudes(small, dora, tmp_path):
    service = lf.Service.open(str(small[0]), str(dora), capacity=1)
    service.add_mixture("x", {"dora": 1.0})
    mixture = f"{_pool((small[0], dora))} --weights dora=1"
    cli.main(f"merge {mixture} --format merged --out {tmp_path / 'out'}".split())
    (tmp_path / "lines").write_text("\n".join(_LINES))
    merged = recipes.generate(base=str(tmp_path / "out"), file=tmp_path / "lines")
    assert service.generate(_LINES, ["x"] * len(_LINES)) == merged
    assert service.generate(_LINES, [None] * len(_LINES)) != merged


def test_mixtures_and_options_that_cannot_be_used_are_refused(
    service, small, names, tmp_path, capsys
):
    for weights, message in (
        ({}, "an empty mixture"),
        ({"nobody": 1.0}, "the module nobody is not loaded: choose of "),
    ):
        with refused(message):
            service.add_mixture("x", weights)
    base = f"--base {small[0]}"
    pool = _pool(small)
    for command, message in (
        (f"generate --pool {small[1]}", "mixtures need a base and a pool"),
        (f"generate {base} --prompt x", "--prompt is the template of a base with a"),
        (f"generate {pool} --runs {small[0]}", "runs have their base, pool, prompt"),
        (f"generate {pool} --stream", "--stream: not possible together with --pool"),
        (f"evaluate {base} --task t", "a mixture needs a pool and a task"),
        (f"evaluate {pool} --task t", "no weights: give some with --weights"),
        (f"evaluate {pool} --task t --weights 0=1", "has no module 0: it has "),
        (
            f"evaluate {pool} --task t --crossbar isaac",
            "--crossbar: not possible together with",
        ),
    ):
        assert message in told(capsys, command.split())
