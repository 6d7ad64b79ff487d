"""Learning rates and epochs by successive halving (Jamieson and Talwalkar, 2016), with the same steps for every arm.

| stage | rates, as multiples of the recipe's | share of the epochs |
|---|---|---:|
| 1 | the first rate times 3^-3, 3^-2, ..., 3^3 | 1/4 |
| 2 | the best two, and two neighbours of the best one: another second rate, or half a step of the only one | 1/2 |
| 3 | the best two | 1 |
| 4, if the best first rate is an end of the seven | that rate times 3 and 9, or divided by them | as the best one |

The best one of all these is chosen, with its share of the epochs: with few rows, a LoRA overfits in all of them.
On the tuning tasks of docs/results/pools.md, the best rate of magnitudes is 0.003 to 0.01 on one model and 0.03 to
0.1 on another; that of coefficients is 0.03 on both. So magnitudes come first.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

Rates = tuple[tuple[str, float], ...]

STEP = 3.0
REACH = 3  # steps of the first rate to both sides
EXTENSION = 2  # further steps beyond an end that is the best
SHARES = (1 / 4, 1 / 2, 1.0)


class Candidate(NamedTuple):
    """Training of a stage.

    Attributes:
      problem: number of the arm and rows that are tuned.
      rates: name and value of each rate.
      share: share of the recipe's epochs.
    """

    problem: int
    rates: Rates
    share: float


class Tuned(NamedTuple):
    """Best rates and epochs.

    Attributes:
      rates: name and value of each rate.
      share: share of the recipe's epochs.
      edge: end of all tried first rates that the best one is, so that others beyond it may be better.
      in_grid: best rates before the grid was extended; None if it was not.
    """

    rates: Rates
    share: float
    edge: Literal["low", "high"] | None = None
    in_grid: Rates | None = None


def tune(
    defaults: Sequence[Rates],
    names: Sequence[str],
    evaluate: Callable[[list[Candidate]], Sequence[float]],
) -> list[Tuned]:
    """Return the best rates of several problems, which pass through each stage together.

    A candidate whose loss is NaN or infinite is never chosen.

    Args:
      defaults: rates of the recipe of each problem.
      names: name of each problem in error messages.
      evaluate: function that returns the loss of each candidate.

    Raises:
      ValueError: no rate of a problem has a finite loss.
    """
    losses = [dict[tuple[Rates, float], float]() for _ in defaults]

    def compare(candidates: list[Candidate]) -> None:
        for candidate, loss in zip(candidates, evaluate(candidates), strict=True):
            tried = candidate.rates, candidate.share
            losses[candidate.problem][tried] = loss if math.isfinite(loss) else math.inf

    leaders: list[list[Rates]] = [_line(rates) for rates in defaults]
    for share in SHARES:
        compare(
            [
                Candidate(number, rates, share)
                for number, of_problem in enumerate(leaders)
                for rates in of_problem
            ]
        )
        for number, of_problem in enumerate(losses):
            best = sorted(
                leaders[number],
                key=lambda rates, of_problem=of_problem, share=share: of_problem[
                    rates, share
                ],
            )[:2]
            leaders[number] = (
                best + _neighbours(best[0]) if share == SHARES[0] else best
            )
    in_grid = [_best(*problem) for problem in zip(defaults, names, losses, strict=True)]
    ends = [
        _end(rates, defaults[number], REACH)
        for number, (rates, _) in enumerate(in_grid)
    ]
    extension = [
        Candidate(number, _times(rates, 0, STEP ** (ends[number] * further)), share)
        for number, (rates, share) in enumerate(in_grid)
        if ends[number]
        for further in range(1, EXTENSION + 1)
    ]
    if extension:
        compare(extension)
    chosen = []
    for number, of_problem in enumerate(losses):
        rates, share = min(of_problem, key=of_problem.__getitem__)
        end = _end(rates, defaults[number], REACH + EXTENSION)
        edge: dict[int, Literal["low", "high"]] = {-1: "low", 1: "high"}
        before = in_grid[number][0] if ends[number] else None
        chosen.append(Tuned(rates, share, edge.get(end), before))
    return chosen


def _line(defaults: Rates) -> list[Rates]:
    return [_times(defaults, 0, STEP**power) for power in range(-REACH, REACH + 1)]


def _neighbours(best: Rates) -> list[Rates]:
    """Return two rates next to the best ones that are not on the line."""
    place, step = (1, STEP) if len(best) > 1 else (0, math.sqrt(STEP))
    return [_times(best, place, factor) for factor in (1 / step, step)]


def _times(rates: Rates, place: int, factor: float) -> Rates:
    name, value = rates[place]
    return (*rates[:place], (name, value * factor), *rates[place + 1 :])


def _best(
    defaults: Rates, name: str, losses: dict[tuple[Rates, float], float]
) -> tuple[Rates, float]:
    rates, share = min(losses, key=losses.__getitem__)
    if math.isinf(losses[rates, share]):
        tried = f"{defaults[0][0]} {defaults[0][1]:.2g}"
        raise ValueError(
            f"{name}: the loss is NaN or infinite at all rates within a factor of {STEP**REACH:g} of {tried}: "
            "give other rates, or leave this arm out"
        )
    return rates, share


def _end(rates: Rates, defaults: Rates, reach: int) -> int:
    """Return 1 or -1 if the first rate is so many steps above or below the recipe's, else 0."""
    steps = math.log(rates[0][1] / defaults[0][1], STEP)
    return round(math.copysign(1, steps)) if abs(steps) > reach - 1e-6 else 0
