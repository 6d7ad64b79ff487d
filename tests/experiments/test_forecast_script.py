"""The forecast's fit on string tasks: advantages and features by hand, halves without common tasks, and its page."""

import csv
import json
from pathlib import Path

import forecast as experiment
import numpy as np
import pytest
from page_tables import rows_below

from lorafusion_jax.trials import read_lines

_ROOT = Path(__file__).resolve().parents[2]
_PAGE = _ROOT / "docs" / "results" / "forecast.md"
_FOLDER = _ROOT / "results" / "forecast"


def _losses(task, arm, seed, draw, loss):
    return {"task": task, "rows": 20, "arm": arm, "seed": seed, "draw": draw, "test_loss": loss}


def test_an_advantage_is_a_mean_over_draws_and_needs_all_seeds_of_both_arms():
    rows = [_losses("a", "LoRAFusion", seed, 0, 0.5) for seed in experiment.SEEDS]
    rows += [_losses("a", "rotated", seed, draw, 0.7 + 0.1 * draw) for seed in experiment.SEEDS for draw in (0, 1, 2)]
    assert experiment.advantages(rows) == {("a", 20): pytest.approx(0.3)}
    assert experiment.advantages([row for row in rows if (row["arm"], row["seed"]) != ("rotated", 5)]) == {}


def test_the_features_of_a_case_are_means_over_its_seeds():
    descents = [
        {"task": "a", "rows": rows, "seed": seed, "loss": 1.0 + seed, "log_ratio": 0.1 * seed}
        for rows in (5, 20)
        for seed in (1, 2)
    ]
    (case,) = experiment.cases_of(descents, {("a", 20): 0.3, ("b", 20): 0.1})
    assert case == {"task": "a", "rows": 20, "loss": 2.5, "log_ratio": pytest.approx(0.15), "advantage": 0.3}


def _cases(tasks, gain=lambda n: 0.1 * n):
    return [
        experiment.Case(task=f"task {task}", rows=20, loss=1.0 + n % 3, log_ratio=0.2 * n, advantage=gain(n))
        for n, task in enumerate(tasks)
    ]


def test_no_task_is_in_both_halves():
    fitted, tested = experiment.halves(_cases([n % 7 for n in range(14)]))
    assert len(fitted) == 6 and len(tested) == 8
    assert not {case["task"] for case in fitted} & {case["task"] for case in tested}


def test_advantages_that_follow_the_descent_are_predicted(tmp_path):
    cases = _cases(range(12))
    table = experiment.evaluated(cases)
    assert [line[:4] for line in table[1:4]] == [
        ["gradient norm, loss and rows", half, "6", "1.000"] for half in ("fit", "fit, left out", "test")
    ]
    assert all(float(line[6]) < 1e-3 < float(line[7]) for line in table[1:4])
    experiment.plot_cases(cases, tmp_path / "cases.png")
    assert (tmp_path / "cases.png").stat().st_size


def test_a_task_that_is_left_out_has_no_part_in_its_own_forecast():
    """A mean without one of n values is n / (n - 1) times as far from it as the mean of all."""
    gains = np.random.default_rng(0).normal(size=12)
    table = experiment.evaluated(_cases(range(12), gain=gains.__getitem__))
    fitted, left_out = (list(map(float, line[6:])) for line in table[1:3])
    assert left_out[0] > fitted[0] and left_out[1] == pytest.approx(6 / 5 * fitted[1], abs=2e-3)


def test_a_calibration_on_the_other_tasks_corrects_the_mean():
    cases, others = _cases(range(12)), _cases(range(20, 26), gain=lambda n: 5 + 0.1 * n)
    plain, calibrated = experiment.of_language(cases, others)[1:]
    assert plain[:3] == ["fit on string tasks", "6", "1.000"] and plain[4] == "0%"
    assert float(plain[5]) == pytest.approx(5, abs=0.1) and float(calibrated[5]) < 1e-3 < float(calibrated[6])


def test_a_rank_correlation_of_unrelated_numbers_has_an_interval_around_zero():
    rng = np.random.default_rng(0)
    tasks = [f"task {n // 2}" for n in range(60)]
    rank, low, high = experiment.rank_correlation(tasks, rng.normal(size=60), rng.normal(size=60), resamples=500)
    assert low < rank < high and low < 0 < high and high - low > 0.3


def test_the_page_has_the_tables_of_its_rows():
    cases = read_lines(_FOLDER / "cases.jsonl")
    relevance = {row["task"]: row["relevance"] for row in read_lines(_FOLDER / "descents.jsonl")}
    language = read_lines(_FOLDER / "language_cases.jsonl")
    tables = {
        "table": experiment.evaluated(cases),
        "features": experiment.explained(cases, relevance, language),
        "language": experiment.of_language(cases, language),
    }
    for name, lines in tables.items():
        with (_FOLDER / f"{name}.csv").open() as file:
            assert list(csv.reader(file)) == lines
        shown = rows_below(_PAGE, lines[0])
        assert shown and [row for row in shown if row not in lines] == []


def test_the_package_has_the_half_of_the_fit():
    packaged = json.loads(experiment.PACKAGED.read_text())
    assert packaged["cases"] == experiment.halves(read_lines(_FOLDER / "cases.jsonl"))[0]
