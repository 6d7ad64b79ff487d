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
    page = _ROOT / "docs" / "results" / "pools.md"
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
    head = "strings: loss minus that of a LoRA from the fusion"
    shown = rows_below(page, [head, "5 rows", "20 rows", "95 rows"])
    assert shown
    for name, *values in shown:
        arm = names.get(name, name.removeprefix("LoRA "))
        assert values == [contrasts[arm, rows] for rows in ("5", "20", "95")], name
