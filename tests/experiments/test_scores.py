"""Tables of results. Oracle: NumPy on the rows themselves."""

import numpy as np
import pytest
import results_page
from lab.scores import main_tables, paired_table, scores
from made_up_rows import METHODS, made_up, row
from refusals import refused

from lorafusion_jax.report import Column, Table

_ROWS = made_up()


def test_more_than_eight_tasks_go_to_a_separate_table():
    tasks = tuple(f"task{i}" for i in range(9))
    rows = made_up(tasks=tasks, methods=("zero-shot", "LoRA"), items=10)
    means, by_task = main_tables(scores(rows)[0])
    assert [column.name for column in means.columns[:3]] == [
        "method",
        "mean",
        "95 % interval",
    ]
    assert [column.name for column in by_task.columns] == ["task", "zero-shot", "LoRA"]
    assert [line[0] for line in by_task.lines] == list(tasks)
    by_hand = [
        r["exact_match"] for r in rows if r["method"] == "LoRA" and r["task"] == "task3"
    ]
    assert by_task.lines[3][2] == pytest.approx(
        (np.mean(by_hand), np.std(by_hand, ddof=1))
    )


def test_a_method_that_lacks_a_task_has_no_mean_and_is_not_compared():
    rows = [r for r in _ROWS if (r["method"], r["task"]) != ("LoRA", "double_digit")]
    (found,) = scores(rows)
    line = next(line for line in main_tables(found)[0].texts if line[0] == "LoRA")
    assert (
        line[2] == line[7] == line[8] == "–" and line[1] != "–" and line[11] == "36,864"
    )
    assert results_page.best_method(found) == "fusion sum"
    texts = paired_table(found, "fusion sum").texts
    assert ["LoRA", *6 * ["–"]] in texts


def test_a_matrix_that_was_interrupted_is_compared_on_the_seeds_of_both():
    rows = [r for r in _ROWS if r["method"] != "LoRA" or r["seed"] < 4]
    difference = dict.fromkeys(METHODS)
    for line in paired_table(scores(rows)[0], "fusion sum").lines:
        difference[line[0]] = line[1]
    means = {
        method: np.mean(
            [r["exact_match"] for r in rows if r["method"] == method and r["seed"] < 4]
        )
        for method in ("fusion sum", "LoRA")
    }
    assert difference["LoRA"] == pytest.approx(means["fusion sum"] - means["LoRA"])
    # Zero-shot has one seed, which stands for all five of the other.
    everywhere = [
        np.mean([r["exact_match"] for r in rows if r["method"] == m])
        for m in ("fusion sum", "zero-shot")
    ]
    assert difference["zero-shot"] == pytest.approx(everywhere[0] - everywhere[1])


def test_rows_and_references_that_make_no_table_are_refused():
    one = row("easy", "LoRA", 1, np.ones(8, bool))
    another = row("easy", "DoRA", 1, np.ones(9, bool))
    columns = [Column("method", "text"), Column("mean", "percent")]
    for make, message in (
        (
            lambda: paired_table(scores(_ROWS)[0], "LoRa"),
            "no results of 'LoRa' to compare with: choose one of",
        ),
        (
            lambda: Table("", columns, [["LoRA"]]),
            r"a line has 1 cells: expected 2, got \['LoRA'\]",
        ),
        (lambda: scores([]), "no results to report"),
        (lambda: scores([one, one]), r"easy, LoRA, 95\+5 shots, seed 1 occurs twice"),
        (
            lambda: scores([one, another]),
            r"easy has 8 \(LoRA\) and 9 \(DoRA\) test rows",
        ),
    ):
        with refused(message):
            make()
