"""The search for learning rates in factors of 3, until no neighbour of the best point is better."""

from collections.abc import Callable, Mapping, Sequence

Point = tuple[int, ...]  # powers of 3, by which the rates of an arm are multiplied


def rates_at(start: Mapping[str, float], point: Point) -> dict[str, float]:
    """Return the rates at a point, from those at the start."""
    return {name: float(f"{rate * 3.0**by:.3g}") for (name, rate), by in zip(start.items(), point, strict=True)}


def best_point(moves: Sequence[Point], losses: Callable[[Sequence[Point]], Sequence[float]]) -> Point:
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
