"""The few shapes of packed and padded batches, chosen by what they cost.

Axis letters: B batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

MOST_SHAPES = 6
# Operations that a core of a CPU computes while a step is compiled: about 5 s of 1e11 each.
COMPILING = 5e11
# Programs of evaluation are smaller: one more shape must save so much of it, but at least so many tokens.
_OF_EVALUATION = 0.05
FEWEST_TOKENS = 400.0
# Widths are multiples of these if that costs little, so that more tasks share programs.
COMMON = (16, 4)
_LITTLE = 0.1  # of what one more shape must save

Numbers = Int[np.ndarray, " n"]
Costs = Float[np.ndarray, " n"]


# Of attention: number, source width and target width of rows that are padded alike.
Group = tuple[int, Any, Any]
# More groups pad less, but take longer to compile.
_GROUPS = 2


class Packing(NamedTuple):
    """What packed batches depend on, other than rows.

    Attributes:
      causal: an answer continues its prompt, whose last token predicts the first label.
      operations: function from numbers of source and target tokens, and the groups of rows in which attention computes
        them, to operations of a training step.
      compiling: operations that every compiled shape must save.
      moving: time of a packed step, whose rows are moved, over that of a padded one of as many operations.
    """

    causal: bool
    operations: Callable[[Any, Any, Sequence[Group]], Any]
    compiling: float = COMPILING
    moving: float = 1.0

    def repeated(self, times: int) -> "Packing":
        """Return the rule for batches that are computed so many times."""
        return self._replace(operations=lambda *shape: times * self.operations(*shape))

    def evaluation_worth(self) -> float:
        """Return the number of tokens that one more shape of an evaluation must save."""
        token_operations = (
            self.operations(1, 1, [(1, 1, 1)]) / 4
        )  # two tokens, of a step with a backward pass
        return max(FEWEST_TOKENS, _OF_EVALUATION * self.compiling / token_operations)

    def plan(
        self,
        lengths: Int[np.ndarray, "seeds steps B 2"],
        padded: Int[np.ndarray, "steps 2"],
        *,
        alike: bool,
    ) -> Int[np.ndarray, "*seeds steps widths"] | None:
        """Return the widths of every batch, from the source and target tokens of its rows.

        First the widths of all source and all target tokens, then those of the rows of each group (`groups`). Those
        that cost least, with their compilation, are chosen. Batches of one step have the same widths in all seeds if
        they have to be `alike`. None is returned where packing saves less than its further shapes, or one, take to
        compile, because tasks share the widths of `padded` rows.
        """
        seeds, steps, rows, _ = lengths.shape
        seeds_together = (
            seeds if alike else 1
        )  # batches of so many seeds in one program
        packed = np.maximum(lengths - np.array([self.causal, 0]), 0)
        group_widths = [
            np.take_along_axis(packed, numbers[..., None], axis=2).max(axis=2)
            for numbers in groups(packed)
        ]
        widths = np.concatenate([packed.sum(axis=2), *group_widths], axis=2)
        widths = widths.max(axis=0) if alike else widths

        def cost(number: Any, *step_widths: Any) -> Any:
            return (
                seeds_together
                * number
                * self.operations(*step_shape(rows, *step_widths))
            )

        few = few_widths(
            widths.reshape(-1, widths.shape[-1]), cost, worth=self.compiling
        )
        further = max(len(np.unique(few, axis=0)) - len(np.unique(padded, axis=0)), 1)
        padding = seeds * np.sum(self.operations(*step_shape(rows, *padded.T)))
        if self.moving * np.sum(cost(1, *few.T)) + self.compiling * further >= padding:
            return None
        return few.reshape(widths.shape)


def groups(
    lengths: Int[np.ndarray, "*leading B 2"],
) -> list[Int[np.ndarray, "*leading _"]]:
    """Return the numbers of the rows that attention pads alike: those of the longer half, and those of the shorter."""
    ranked = np.argsort(-lengths.sum(axis=-1), axis=-1, kind="stable")
    return np.array_split(ranked, min(_GROUPS, ranked.shape[-1]), axis=-1)


def step_shape(
    rows: int, source: Any, target: Any, *group_widths: Any
) -> tuple[Any, Any, list[Group]]:
    """Return the arguments of `Packing.operations` for widths of a step, those of `Packing.plan` or of padded rows."""
    if not group_widths:
        return rows * source, rows * target, [(rows, source, target)]
    counts = [len(numbers) for numbers in groups(np.zeros((rows, 2), int))]
    return (
        source,
        target,
        list(zip(counts, group_widths[::2], group_widths[1::2], strict=True)),
    )


def few_widths(
    widths: Int[np.ndarray, "n widths"], cost: Callable[..., Costs], *, worth: float
) -> Int[np.ndarray, "n widths"]:
    """Return widths for each given list of them, none smaller, at most MOST_SHAPES different lists.

    They cost the least together, given the cost of so many items (first argument) of some widths, and `worth` for each
    list. Widths above 32 are multiples of 4. All are multiples of 16, or of 4, if that costs little.
    """
    exact = np.where(widths > 32, -(-widths // 4) * 4, np.maximum(widths, 1))
    least, few = _grouped(exact, cost, worth)
    for common in COMMON:
        costs, shared = _grouped(-(-exact // common) * common, cost, worth)
        if costs < least + _LITTLE * worth:
            return shared
    return few


def _grouped(
    widths: Int[np.ndarray, "n widths"], cost: Callable[..., Costs], worth: float
) -> tuple[float, Int[np.ndarray, "n widths"]]:
    """Return the cost of the lists of `few_widths`, and the lists."""
    sources, place, counts = np.unique(
        widths[:, 0], return_inverse=True, return_counts=True
    )
    least = np.zeros((len(sources), widths.shape[1]), int)
    np.maximum.at(least, place, widths)
    # Cost of a group of consecutive sources, from number i to number j.
    costs = np.full((len(sources), len(sources)), np.inf)
    for i in range(len(sources)):
        costs[i, i:] = cost(np.cumsum(counts[i:]), *np.maximum.accumulate(least[i:]).T)
    # Of groups up to j: their cost, and where the last one begins, for each number of groups.
    best = [costs[0]]
    begins = [np.zeros(len(sources), int)]
    while len(best) < min(MOST_SHAPES, len(sources)):
        totals = np.pad(
            best[-1][:-1, None] + costs[1:], ((1, 0), (0, 0)), constant_values=np.inf
        )
        begins.append(np.argmin(totals, axis=0))
        best.append(np.min(totals, axis=0))
    totals = np.array([costs_of_row[-1] for costs_of_row in best]) + worth * np.arange(
        1, len(best) + 1
    )
    number = int(np.argmin(totals))
    end = len(sources)
    for begin in reversed(begins[: number + 1]):
        group = slice(int(begin[end - 1]), end)
        least[group], end = least[group].max(axis=0), group.start
    return float(totals[number]), least[place]
