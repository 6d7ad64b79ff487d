"""Learning rates and epochs by successive halving (Jamieson and Talwalkar, 2016).

| stage | rates | share of the epochs |
|---|---|---:|
| 1 | the default ones | 1/4 |
| 2 | the first rate times and divided by 3; further while an end of these is the best, up to a factor of 243 | 1/4 |
| 3 | the second rate times and divided by 3 (or half a step of the only one) at the best first rate | 1/4 |
| 4 | the best two | 1/2 |
| 5 | the best one | 1 |

The best one of all these is chosen, with its share of the epochs: with few rows, a LoRA overfits in all of them.
On the tuning tasks of docs/results/pool_value.md, the best rate of magnitudes is 0.003 to 0.01 on one model and 0.03 to
0.1 on another; that of coefficients is 0.03 on both. So magnitudes come first.
"""

import math
from collections.abc import Generator
from typing import NamedTuple

Rates = tuple[tuple[str, float], ...]

STEP = 3.0
REACH = 5  # steps of the first rate to both sides
SHORT = 1 / 4  # share of the epochs in which rates are compared first
FINALISTS = {1 / 2: 2, 1.0: 1}  # rates that train for a larger share


class Candidate(NamedTuple):
    """Name and value of each rate, and share of the recipe's epochs."""

    rates: Rates
    share: float


def halving(
    defaults: Rates,
) -> Generator[list[Candidate], list[float], None]:
    """Yield the candidates of each stage, for whose losses it waits; infinite losses are those of divergence."""
    losses = dict[Candidate, float]()

    def compared(
        rates: list[Rates], share: float
    ) -> Generator[list[Candidate], list[float], None]:
        candidates = [Candidate(rate, share) for rate in rates]
        losses.update(zip(candidates, (yield candidates), strict=True))

    def best(share: float, count: int = 1) -> list[Rates]:
        tried = [candidate for candidate in losses if candidate.share == share]
        return [
            candidate.rates
            for candidate in sorted(tried, key=losses.__getitem__)[:count]
        ]

    yield from compared([defaults], SHORT)
    ends = {-1: defaults, 1: defaults}
    for _ in range(REACH):
        # In the first round the default is both ends.
        sides = [side for side, rates in ends.items() if rates == best(SHORT)[0]]
        if not sides:
            break
        for side in sides:
            ends[side] = _times(ends[side], 0, STEP**side)
        yield from compared([ends[side] for side in sides], SHORT)
    (leader,) = best(SHORT)
    place, step = (1, STEP) if len(defaults) > 1 else (0, math.sqrt(STEP))
    yield from compared(
        [_times(leader, place, 1 / step), _times(leader, place, step)], SHORT
    )
    share_before = SHORT
    for share, count in FINALISTS.items():
        yield from compared(best(share_before, count), share)
        share_before = share


def _times(rates: Rates, place: int, factor: float) -> Rates:
    name, value = rates[place]
    return (*rates[:place], (name, value * factor), *rates[place + 1 :])
