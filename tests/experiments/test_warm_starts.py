"""LoRAs that start from a pool: committed rows, rates and tables, and the tests of the design by hand."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
import warm_starts as experiment
from page_tables import rows_below

from lorafusion_jax.trials import read_lines

_ROOT = Path(__file__).resolve().parents[2]
_RESULTS = _ROOT / "results" / "warm_starts"
_ROWS = read_lines(_RESULTS / f"{'rows'}.jsonl")
_TUNING = read_lines(_RESULTS / f"{'tune'}.jsonl")
_ALL = experiment.with_earlier_rows(_ROWS)
_MEASURED = {(row["arm"], row["rows"]) for row in _ROWS}


@pytest.mark.parametrize(("arm", "rows"), sorted(_MEASURED))
def test_every_cell_has_a_row_with_rates_that_no_change_of_one_improves(arm, rows):
    own = [row for row in _ROWS if (row["arm"], row["rows"]) == (arm, rows)]
    cells = {(row["task"], row["seed"]) for row in own}
    assert len(own) == len(cells) == 90 and {row["steps"] for row in own} == {
        200 if rows == 95 else 40
    }
    losses: dict[tuple[int, ...], list[float]] = {}
    rates = {}
    for row in _TUNING:
        if (row["arm"], row["rows"]) == (arm, rows):
            losses.setdefault(tuple(row["point"]), []).append(row["test_loss"])
            rates[tuple(row["point"])] = row["rates"]
    (best,) = (point for point in rates if rates[point] == own[0]["rates"])
    for place, by in itertools.product(range(len(best)), (-1, 1)):
        neighbour = tuple(value + by * (n == place) for n, value in enumerate(best))
        assert (
            np.mean(losses[neighbour]) >= np.mean(losses[best])
            and len(losses[neighbour]) == 6
        )


def test_the_primary_test_is_a_t_interval_over_tasks():
    loss = {
        (row["arm"], row["task"], row["seed"]): row["test_loss"]
        for row in _ALL
        if row["rows"] == 20
    }
    values = [
        np.mean(
            [
                loss[experiment.LORA, task, seed] - loss[experiment.WARM, task, seed]
                for seed in (1, 2, 3)
            ]
        )
        for task in {row["task"] for row in _ROWS}
    ]
    # t of 29 degrees of freedom
    mean = np.mean(values)
    half = 2.0452 * np.std(values, ddof=1) / np.sqrt(30)
    assert experiment.tests(_ALL)[1][1:3] == [
        f"{mean:.3f}",
        f"{mean - half:.3f} to {mean + half:.3f}",
    ]


def test_the_page_has_the_contrasts_of_the_tables():
    page = _ROOT / "docs" / "results" / "ways_to_use_a_pool.md"
    lines = csv.reader(
        (_RESULTS / "contrasts.csv").read_text().replace("-", "−").splitlines()
    )
    contrasts = {
        (line[1], line[0]): f"{line[4]} ({line[5]})"
        for line in lines
        if line[2] == "all"
    }
    names = {
        "LoRA from scratch": experiment.LORA,
        "LoRAFusion alone": experiment.FUSION,
    }
    shown = rows_below(
        page, ["minus LoRA from the fusion, nats", "5 rows", "20 rows", "95 rows"]
    )
    assert len(shown) == 2 + len(experiment.STARTED) - 1
    for name, *values in shown:
        arm = names.get(name, name.removeprefix("LoRA "))
        assert values == [contrasts[arm, rows] for rows in ("5", "20", "95")], name


def test_the_page_has_the_language_arms_of_the_tables():
    page = _ROOT / "docs" / "results" / "ways_to_use_a_pool.md"
    arms = list(
        csv.reader(
            (_RESULTS / f"language_{'arms'}.csv")
            .read_text()
            .replace("-", "−")
            .splitlines()
        )
    )
    contrasts = list(
        csv.reader(
            (_RESULTS / f"language_{'contrasts'}.csv")
            .read_text()
            .replace("-", "−")
            .splitlines()
        )
    )
    values = {arm: line for arm, *line, _ in arms}
    slow = "from the fusion, a tenth of the rate"
    gains = {line[0]: f"{line[3]} ({line[4]})" for line in contrasts}
    names = {"from scratch": "LoRA, rank 8", "LoRAFusion alone": "LoRAFusion"}
    shown = rows_below(
        page, ["arm", "seeds", "loss, nats", "exact match", "minus the second row"]
    )
    assert len(shown) == len(values) - 1
    for name, *found in shown:
        arm = names.get(short := name.removeprefix("LoRA "), short)
        assert found == [*values[arm], gains.get(f"{arm} minus {slow}", "–")], name
