"""Learning rates: a search in factors of 3 until no neighbour of the best is better."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from lorafusion_jax.trials import ResultRows, Row

Point = tuple[int, ...]  # powers of 3, by which the rates of an arm are multiplied


def rates_at(start: Mapping[str, float], point: Point) -> dict[str, float]:
    """Return the rates at a point, from those at the start."""
    return {
        name: float(f"{rate * 3.0**by:.3g}")
        for (name, rate), by in zip(start.items(), point, strict=True)
    }


def best_point(
    moves: Sequence[Point], losses: Callable[[Sequence[Point]], Sequence[float]]
) -> Point:
    """Return a point that no move makes better, from all zeros on.

    Args:
      moves: steps to all neighbours of a point.
      losses: function that returns the loss of each given point; a repeated one must be the same.
    """
    best: Point = (0,) * len(moves[0])
    while True:
        around = [best, *(tuple(map(sum, zip(best, by, strict=True))) for by in moves)]
        of_best, *others = losses(around)
        if min(others) >= of_best:
            return best
        best = around[1 + others.index(min(others))]


def tune(
    cells: ResultRows[tuple[Any, ...]],
    of_arm: tuple[Any, ...],
    begin: Mapping[str, float],
    over: Sequence[tuple[Any, ...]],
    measure: Callable[[list[tuple[Any, ...]]], Iterable[Row]],
    *,
    together: bool = False,
) -> dict[str, float]:
    """Return the rates of an arm whose mean test loss no change of one rate lowers, or of several together.

    Args:
      cells: of the tuning; the key of one is the arm's, a point, and one of `over`.
      of_arm: key of the arm.
      begin: rates at the first point.
      over: tasks, or tasks and seeds, that losses are means over.
      measure: function that yields the rows of missing cells.
      together: several rates change at once.
    """
    most = len(begin) if together else 1
    moves = [
        by
        for by in itertools.product((-1, 0, 1), repeat=len(begin))
        if 0 < sum(map(abs, by)) <= most
    ]

    def losses(points: Sequence[Point]) -> list[float]:
        keys = [
            (*of_arm, point, *each) for each, point in itertools.product(over, points)
        ]
        cells.fill(
            keys, measure, lambda row: f"{cells.key_of(row)}: {row['test_loss']:.3f}"
        )
        found = {cells.key_of(row): row["test_loss"] for row in cells.rows()}
        return [
            fmean(found[(*of_arm, point, *each)] for each in over) for point in points
        ]

    return rates_at(begin, best_point(moves, losses))


class Tried(NamedTuple):
    """The best rates of a search, their mean test loss, and how many were tried."""

    rates: dict[str, float]
    loss: float
    number: int


def best_tried(trials: Iterable[Row], arm: str, rows: int) -> Tried | None:
    """Return the best of an arm's trials at a number of training rows, None if there are none."""
    by_point: dict[Point, list[Row]] = {}
    for row in trials:
        if (row["arm"], row["rows"]) == (arm, rows):
            by_point.setdefault(tuple(row["point"]), []).append(row)
    losses = {
        point: float(np.mean([row["test_loss"] for row in own]))
        for point, own in by_point.items()
    }
    if not losses:
        return None
    best = min(losses, key=lambda point: losses[point])
    return Tried(by_point[best][0]["rates"], losses[best], len(losses))


def tried_line(trials: Iterable[Row], arm: str, rows: int) -> list[list[str]]:
    """Return the line of a table with the best rates of an arm, no line if none were tried."""
    best = best_tried(trials, arm, rows)
    if best is None:
        return []
    shown = ", ".join(
        f"{name.removeprefix('lr_')} {rate:g}" for name, rate in best.rates.items()
    )
    return [[arm, str(rows), shown, f"{best.loss:.3f}", str(best.number)]]
