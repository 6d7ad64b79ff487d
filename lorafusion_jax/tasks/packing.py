"""The lanes of packed batches, and the few shapes of all batches, chosen by what they cost.

Axis letters: B batch, S source, T target.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

MOST_SHAPES = 6
# Operations that a core of a CPU computes while a step is compiled: 5 s (docs/results/speed.md) of 1e11 each.
COMPILING = 5e11
# Programs of evaluation are smaller: one more shape must save so much of it, but at least so many tokens.
_OF_EVALUATION, FEWEST_TOKENS = 0.05, 400.0
# Widths are multiples of these if that costs little, so that more tasks share programs.
COMMON = (16, 4)
_LITTLE = 0.1  # of what one more shape must save

Numbers = Int[np.ndarray, " n"]
Costs = Float[np.ndarray, " n"]


class Packing(NamedTuple):
    """What packed batches depend on, other than rows.

    Attributes:
      causal: an answer continues its prompt, whose last token predicts the first label.
      operations: function from a number of lanes, and widths of source and target, to operations of a training step.
      compiling: operations that every compiled shape must save.
      padding: price of a computed token beyond its operations, as a share of its products. At 0.9, 92 % of the tokens
        of BIG-Bench Hard are real for one seed of FLAN-T5-small, at 1 % more operations (benchmarks/padding.py).
    """

    causal: bool
    operations: Callable[[int, Any, Any], Any]
    compiling: float = COMPILING
    padding: float = 0.9

    def repeated(self, times: int) -> "Packing":
        """Return the rule for batches that are computed so many times."""
        return self._replace(operations=lambda *shape: times * self.operations(*shape))

    def evaluation_worth(self) -> float:
        """Return the number of tokens that one more shape of an evaluation must save."""
        of_token = self.operations(1, 1, 1) / 4  # two tokens, of a step with a backward pass
        return max(FEWEST_TOKENS, _OF_EVALUATION * self.compiling / of_token)

    def plan(
        self, lengths: Int[np.ndarray, "seeds steps B 2"], padded: Int[np.ndarray, "steps 2"], *, alike: bool
    ) -> tuple[Int[np.ndarray, "seeds steps B"], Int[np.ndarray, "*seeds steps 2"]] | None:
        """Return the lane of every row, and the source and target width of every batch, from the tokens of its rows.

        All batches have the same number of lanes. Lanes and widths are those that cost least, with their compilation.
        Batches of one step have the same widths in all seeds if they have to be `alike`. None is returned where packing
        saves less than its further shapes, or one, take to compile, because tasks share the widths of `padded` rows.
        """
        seeds, steps, rows, _ = lengths.shape
        together = seeds if alike else 1  # batches of so many seeds in one program
        of_token = self.padding / 2 * self.operations(1, 1, 1)
        batches = np.maximum(lengths - np.array([self.causal, 0]), 0).reshape(-1, rows, 2)
        plans = []
        for count in {-(-rows // each) for each in range(2, rows + 1)}:

            def cost(number: Any, source: Any, target: Any, count: int = count) -> Any:
                operations = self.operations(count, source, target) + of_token * count * (source + target)
                return together * number * operations

            lane, widths = _fill(batches, count)
            widths = widths.reshape(seeds, steps, 2)
            widths = widths.max(axis=0) if alike else widths
            few = few_widths(widths.reshape(-1, 2), cost, worth=self.compiling)
            plans.append((np.sum(cost(1, *few.T)), len(np.unique(few, axis=0)), lane, few.reshape(widths.shape)))
        if not plans:
            return None
        costs, shapes, lane, few = min(plans, key=lambda plan: plan[0] + self.compiling * plan[1])
        padding = self.operations(rows, *padded.T) + of_token * rows * np.sum(padded, axis=1)
        further = max(shapes - len(np.unique(padded, axis=0)), 1)
        if costs + self.compiling * further >= seeds * np.sum(padding):
            return None
        return lane.reshape(seeds, steps, rows), few


def _fill(lengths: Int[np.ndarray, "n B 2"], count: int) -> tuple[Int[np.ndarray, "n B"], Int[np.ndarray, "n 2"]]:
    """Put the longest row that is left into the emptiest lane, until every row has one."""
    batches, lane = np.arange(len(lengths)), np.zeros(lengths.shape[:2], int)
    used = np.zeros((len(lengths), count, 2), int)
    for rows in np.argsort(-lengths.sum(axis=2), axis=1, kind="stable").T:
        emptiest = used.sum(axis=2).argmin(axis=1)
        lane[batches, rows] = emptiest
        used[batches, emptiest] += lengths[batches, rows]
    return lane, used.max(axis=1)


def few_widths(
    widths: Int[np.ndarray, "n 2"], cost: Callable[[Numbers, Numbers, Numbers], Costs], *, worth: float
) -> Int[np.ndarray, "n 2"]:
    """Return a source and a target width for each given pair, neither smaller, at most MOST_SHAPES different pairs.

    They cost the least together, given the cost of so many items of two widths, and `worth` for each pair.
    Widths above 32 are multiples of 4. All are multiples of 16, or of 4, if that costs little.
    """
    exact = np.where(widths > 32, -(-widths // 4) * 4, np.maximum(widths, 1))
    least, few = _grouped(exact, cost, worth)
    for common in COMMON:
        costs, shared = _grouped(-(-exact // common) * common, cost, worth)
        if costs < least + _LITTLE * worth:
            return shared
    return few


def _grouped(
    widths: Int[np.ndarray, "n 2"], cost: Callable[[Numbers, Numbers, Numbers], Costs], worth: float
) -> tuple[float, Int[np.ndarray, "n 2"]]:
    """Return the cost of the pairs of `few_widths`, and the pairs."""
    sources, place, counts = np.unique(widths[:, 0], return_inverse=True, return_counts=True)
    targets = np.zeros_like(sources)
    np.maximum.at(targets, place, widths[:, 1])
    # Cost of a group of consecutive sources, from number i to number j.
    costs = np.full((len(sources), len(sources)), np.inf)
    for i in range(len(sources)):
        costs[i, i:] = cost(np.cumsum(counts[i:]), sources[i:], np.maximum.accumulate(targets[i:]))
    # Of groups up to j: their cost, and where the last one begins, for each number of groups.
    best, begins = [costs[0]], [np.zeros(len(sources), int)]
    while len(best) < min(MOST_SHAPES, len(sources)):
        totals = np.pad(best[-1][:-1, None] + costs[1:], ((1, 0), (0, 0)), constant_values=np.inf)
        begins.append(np.argmin(totals, axis=0))
        best.append(np.min(totals, axis=0))
    totals = np.array([one[-1] for one in best]) + worth * np.arange(1, len(best) + 1)
    number = int(np.argmin(totals))
    end = len(sources)
    for begin in reversed(begins[: number + 1]):
        group = slice(int(begin[end - 1]), end)
        sources[group], targets[group], end = sources[end - 1], targets[group].max(), group.start
    return float(totals[number]), np.stack([sources, targets], axis=1)[place]
