"""Leaving one task of BIG-Bench Hard out: parts on a small Llama, checks of the rows, and tests by hand."""

import csv
import functools
import json
import math
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import bbh_leave_one_out as experiment
import bbh_rows
import numpy as np
import pytest
import small_llama
from page_tables import rows_below

from lorafusion_jax.tasks import Example, Task, write_lorahub_split
from lorafusion_jax.trials import append_lines, read_lines

_RESULTS = Path(__file__).resolve().parents[2] / "results" / "bbh_leave_one_out"
_ALL = json.loads((files("lorafusion_jax.tasks") / "lorahub_split.json").read_text())


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs parts on made-up rows, with two tasks in the pilot and one step an epoch."""
    rows, index = bbh_rows.write(tmp_path / "rows")
    llama = small_llama.make(tmp_path / "llama", max_position_embeddings=1024)
    monkeypatch.setattr(experiment, "write_lorahub_split", functools.partial(write_lorahub_split, index=index))
    monkeypatch.setattr(experiment, "PILOT", (experiment.RATED, "boolean_expressions"))
    monkeypatch.setattr(experiment, "TWELVE", ("boolean_expressions",))

    def run(*words):
        where = ("--bbh", rows, "--base", llama, "--out", tmp_path / "out", "--runs", tmp_path / "runs")
        experiment.main([*map(str, where), *words])
        return read_lines(tmp_path / "out" / "adapters.jsonl")

    return run


@pytest.mark.long
def test_parts_continue_and_arms_fuse_the_adapters(run, tmp_path, capsys, monkeypatch):
    run("--parts", "adapters", "--plan")
    assert capsys.readouterr().out.startswith("adapters: 4 cells")
    rows = run("--parts", "pilot")
    assert [(row["task"], row["rate"]) for row in rows[:2]] == [("object_counting", 0.001), ("object_counting", 0.003)]
    boolean = rows[2]
    # Of four training rows two are True: each answer that was seen has 3 of 7 parts.
    assert boolean["frequencies"] == pytest.approx([math.log(7 / 3)] * 4, abs=1e-4)
    assert all(len(boolean[of]) == 4 for of in ("adapter", "alone", "examples", "answer_tokens"))
    assert len(run("--parts", "pilot")) == 3
    monkeypatch.setattr(experiment, "LEARNED", 3)
    with pytest.raises(ValueError, match="llama learns . tasks of the pilot: the design ends below 3"):
        run("--parts", "adapters")
    monkeypatch.setattr(experiment, "LEARNED", 0)
    assert len(run("--parts", "adapters")) == 5
    key = {"base": "llama", "rows_sha256": boolean["rows_sha256"], "arm": experiment.FUSION, "rows": 20}
    for arm in (experiment.FUSION, experiment.ROTATED):
        rates = {"point": [0, 0], "rates": {"lr_coefficients": 0.01, "lr_magnitudes": 0.1}}
        append_lines(
            tmp_path / "out" / "rates.jsonl", [key | rates | {"arm": arm, "task": "", "seed": 1, "test_loss": 1}]
        )
    run("--parts", "main")
    fused, rotated = read_lines(tmp_path / "out" / "rows.jsonl")
    assert fused["test_loss"] != rotated["test_loss"] and fused["option_accuracy"] in (0, 25, 50, 75, 100)


def test_a_test_question_that_any_task_trains_on_is_refused():
    def task(name, *questions):
        train, test = (tuple(Example(f"{name}.\n\nQ: {q}\nA:", "Yes") for q in part) for part in questions)
        return Task(name, train, test, name)

    tasks = {"one": task("one", "ab", "cd"), "two": task("two", "ef", "gh")}
    experiment.check_unseen(tasks)
    with pytest.raises(ValueError, match="test questions of two are training questions of one"):
        experiment.check_unseen(tasks | {"two": task("two", "ef", "ga")})


def test_the_cells_are_those_of_the_design():
    lab = experiment.Lab(experiment.Options(), {})
    lab.tasks = dict.fromkeys(_ALL, Task("", (), (), ""))
    main = lab.wanted("main")
    assert len({*main}) == len(main) == 24 * 3 * 4 + 6 * 3 * 2
    assert len({cell.task for cell in main}) == 24 and not {cell.task for cell in main} & {*experiment.TUNING}
    assert len(experiment.PILOT) == len(experiment.NINE) == 9 and len(experiment.TWELVE) == 12
    assert {*experiment.PILOT, *experiment.TWELVE, *experiment.TUNING} <= _ALL.keys()
    for rates in (1, 2):
        assert len({*experiment.moves(rates)}) == 8


@pytest.mark.parametrize(
    ("target", "siblings", "left_out"),
    [
        ("navigate", True, 1),
        ("logical_deduction_three_objects", True, 1),
        ("logical_deduction_three_objects", False, 3),
    ],
)
def test_a_target_and_if_asked_its_siblings_are_left_out_of_the_pool(target, siblings, left_out, monkeypatch):
    monkeypatch.setattr(experiment, "best_rate", lambda rows: 0.001)
    lab = experiment.Lab(experiment.Options(), {})
    lab.tasks = dict.fromkeys(_ALL, Task("", (), (), ""))
    lab.alone = SimpleNamespace(base=SimpleNamespace(source="base"), config=SimpleNamespace(sites=("blocks.q_proj",)))
    arms = lab.lanes(target, 1, 20, siblings).arms
    for name in (experiment.FUSION, experiment.ROTATED, experiment.LORAHUB):
        missing = _ALL.keys() - {*arms[name].adapters}
        assert target in missing and len(missing) == left_out and arms[name].recipe.modules == 27 - left_out
    assert all(not arms[name].adapters for name in (experiment.LORA, experiment.MAGNITUDES, experiment.ZERO))


@pytest.mark.parametrize(("below", "learned"), [(0.021, True), (0.019, False)])
def test_a_task_is_learned_below_both_controls_by_two_standard_errors(below, learned):
    spread = np.tile([0.1, -0.1], 50)  # two standard errors are 0.0201
    row = {"adapter": [2.0] * 100, "examples": (2 * (1 + below + spread)).tolist(), "frequencies": [9.0] * 100}
    assert experiment.learns(row | {"answer_tokens": [2] * 100}) == learned


def test_tests_are_over_tasks_and_wait_for_all_of_them():
    tasks = [name for name in _ALL if name not in experiment.TUNING]
    rows = []
    for place, task in enumerate(tasks):
        siblings = (True, False) if experiment.family(task) != task else (True,)
        for arm, loss in (("LoRAFusion", 1.0), ("rotated", 1.1 + place / 100), (experiment.LORA, 1.0 + place / 100)):
            of = {
                "arm": arm,
                "rows": 20,
                "task": task,
                "seed": 1,
                "exact_match": 10.0 * loss + place % 3 * (arm != "rotated"),
            }
            rows += [of | {"siblings": on, "test_loss": loss + place * (not on)} for on in siblings]
    lines = {line[0]: line[1:] for line in experiment.tests(rows)[1:]}
    assert lines["rotated minus LoRAFusion, loss"][:2] == ["24", "0.215"]
    assert lines["LoRA minus LoRAFusion, loss"][:2] == ["24", "0.115"]
    assert lines["LoRAFusion, siblings in the pool minus none, loss"][0] == "6"
    assert len(lines) == 5 and len(experiment.tests(rows[:-1])) == 1


@pytest.mark.parametrize("results", [_RESULTS, _RESULTS / "gemma"])
def test_tables_are_those_of_their_rows(results):
    found = [read_lines(results / f"{name}.jsonl") for name in ("adapters", "rows", "rates")]
    for name, lines in experiment.tables(*found).items():
        assert list(csv.reader((results / f"{name}.csv").read_text().splitlines())) == lines


def test_the_page_has_the_pilot_of_both_models():
    small, gemma = (csv.reader((of / "pilot.csv").read_text().splitlines()) for of in (_RESULTS, _RESULTS / "gemma"))
    lines = [[*a[:1], *a[2:5], *b[2:5], _LEARNED_BY.get((a[5], b[5]))] for a, b in zip(small, gemma, strict=True)][1:]
    head = [part for model in ("SmolLM2", "Gemma") for part in (f"{model}: 3 examples", "frequencies", "adapter")]
    assert rows_below(_PAGE, ["task", *head, "learned by"]) == lines


_LEARNED_BY = {("yes", "yes"): "both", ("no", "yes"): "Gemma", ("no", "no"): "neither"}
_PAGE = _RESULTS.parents[1] / "docs" / "results" / "bbh_leave_one_out.md"
