"""The pilot on BIG-Bench Hard: the whole path on a small Llama, checks of the rows, the rule by hand, and the page."""

import csv
import functools
import math
from pathlib import Path

import bbh_leave_one_out as experiment
import bbh_rows
import numpy as np
import pytest
import small_llama
from page_tables import assert_written, rows_below

from lorafusion_jax.tasks import Example, Task, write_lorahub_split
from lorafusion_jax.trials import read_lines

_RESULTS = Path(__file__).resolve().parents[2] / "results" / "bbh_leave_one_out"


@pytest.mark.long
def test_the_pilot_measures_what_is_missing(tmp_path, capsys, monkeypatch):
    """Two tasks of made-up rows, and one step an epoch."""
    folder, index = bbh_rows.write(tmp_path / "rows")
    llama = small_llama.make(tmp_path / "llama", max_position_embeddings=1024)
    monkeypatch.setattr(
        experiment,
        "write_lorahub_split",
        functools.partial(write_lorahub_split, index=index),
    )
    monkeypatch.setattr(experiment, "PILOT", (experiment.RATED, "boolean_expressions"))

    def run(*words):
        where = (
            "--bbh",
            folder,
            "--base",
            llama,
            "--out",
            tmp_path / "out",
            "--runs",
            tmp_path / "runs",
        )
        experiment.main([*map(str, where), *words])
        return read_lines(tmp_path / "out" / "adapters.jsonl")

    run("--plan")
    assert capsys.readouterr().out.startswith("pilot: 3 cells")
    rows = run()
    assert [(row["task"], row["rate"]) for row in rows[:2]] == [
        ("object_counting", 0.001),
        ("object_counting", 0.003),
    ]
    # Of four training rows two are True: each answer that was seen has 3 of 7 parts.
    assert rows[2]["frequencies"] == pytest.approx([math.log(7 / 3)] * 4, abs=1e-4)
    assert all(
        len(rows[2][of]) == 4
        for of in ("adapter", "alone", "examples", "answer_tokens")
    )
    assert (tmp_path / "out" / "pilot.csv").read_text().count("\n") == 3
    assert run("--plan") == run() == rows
    assert "0 cells" in capsys.readouterr().out


def test_a_test_question_that_any_task_trains_on_is_refused():
    def task(name, *questions):
        train, test = (
            tuple(Example(f"{name}.\n\nQ: {q}\nA:", "Yes") for q in part)
            for part in questions
        )
        return Task(name, train, test, name)

    tasks = {"one": task("one", "ab", "cd"), "two": task("two", "ef", "gh")}
    experiment.check_unseen(tasks)
    with pytest.raises(
        ValueError, match="test questions of two are training questions of one"
    ):
        experiment.check_unseen(tasks | {"two": task("two", "ef", "ga")})


@pytest.mark.parametrize(
    ("results", "base"),
    [(_RESULTS, None), (_RESULTS / "gemma", Path("gemma-3-270m-q4_k_m.gguf"))],
)
def test_no_row_is_missing_and_tables_are_those_of_their_rows(results, base):
    lab = experiment.Lab(experiment.Options(out=results, base=base), {})
    assert lab.cells.missing(lab.jobs()) == []
    assert_written({"pilot": experiment.table(lab.cells.rows())}, results)


@pytest.mark.parametrize(("below", "learned"), [(0.021, True), (0.019, False)])
def test_a_task_is_learned_below_both_controls_by_two_standard_errors(below, learned):
    spread = np.tile([0.1, -0.1], 50)  # two standard errors are 0.0201
    row = {
        "adapter": [2.0] * 100,
        "examples": (2 * (1 + below + spread)).tolist(),
        "frequencies": [9.0] * 100,
    }
    assert experiment.learns(row | {"answer_tokens": [2] * 100}) == learned


def test_the_page_has_the_pilot_of_both_models():
    small = csv.reader((_RESULTS / "pilot.csv").read_text().splitlines())
    gemma = csv.reader((_RESULTS / "gemma" / "pilot.csv").read_text().splitlines())
    lines = [
        [*a[:1], *a[2:5], *b[2:5], _LEARNED_BY.get((a[5], b[5]))]
        for a, b in zip(small, gemma, strict=True)
    ][1:]
    head = [
        part
        for model in ("SmolLM2", "Gemma")
        for part in (f"{model}: 3 examples", "frequencies", "adapter")
    ]
    assert rows_below(_PAGE, ["task", *head, "learned by"]) == lines


_LEARNED_BY = {("yes", "yes"): "both", ("no", "yes"): "Gemma", ("no", "no"): "neither"}
_PAGE = _RESULTS.parents[1] / "docs" / "results" / "bbh_leave_one_out.md"
