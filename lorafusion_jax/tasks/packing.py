"""The few shapes of packed and padded batches: widths of a fixed ladder, of which the least useful ones are left out.

Axis letters: B batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

MOST_SHAPES = 6
# Operations that a core of a CPU computes while a step is compiled: about 5 s of 1e11 each. An accelerator computes 500
# times as many, 5e13 a second, by the compiler's cycles for a TPU v5e (docs/results/accelerators.md).
COMPILING = 5e11
_ACCELERATED = 500
# Time of a packed step on an accelerator, whose rows are moved, over that of a padded one, by the same cycles.
_MOVING = 1.5
# Programs of evaluation are smaller: one more shape must save so much of it, but at least so many tokens.
_OF_EVALUATION = 0.05
FEWEST_TOKENS = 400.0
# More groups pad less, but take longer to compile.
_GROUPS = 2
# A model of so few layers compiles as fast without a loop over them.
SHALLOW = 8
# As measured (docs/concepts/speed.md), unrolled layers save 5 % of the operations of training on a CPU, and compiling
# a further layer takes 5e10. Per number of d_model, a step of so many operations keeps 1 GiB for the backward pass.
_UNROLLING = 1e12
_MOST_OPERATIONS = 1.6e9

# Of attention: number, source width and target width of rows that are padded alike.
Group = tuple[int, Any, Any]
Lengths = Int[np.ndarray, "n widths"]


class Packing(NamedTuple):
    """What packed batches depend on, other than rows.

    Attributes:
      causal: an answer continues its prompt, whose last token predicts the first label.
      operations: function from numbers of source and target tokens, and the groups of rows in which attention computes
        them, to operations of a training step.
      compiling: operations that every compiled shape must save.
      moving: time of a packed step over that of a padded one of as many operations.
    """

    causal: bool
    operations: Callable[[Any, Any, Sequence[Group]], Any]
    compiling: float = COMPILING
    moving: float = 1.0

    def on_accelerator(self) -> "Packing":
        """Return the rule for an accelerator."""
        return self._replace(compiling=_ACCELERATED * COMPILING, moving=_MOVING)

    def repeated(self, times: int) -> "Packing":
        """Return the rule for batches that are computed so many times."""
        return self._replace(operations=lambda *shape: times * self.operations(*shape))

    def evaluation_compile_cost(self) -> float:
        """Return the number of tokens that one more shape of an evaluation must save."""
        # two tokens, of a step with a backward pass
        token_operations = self.operations(1, 1, [(1, 1, 1)]) / 4
        return max(FEWEST_TOKENS, _OF_EVALUATION * self.compiling / token_operations)

    def plan(
        self,
        lengths: Int[np.ndarray, "seeds steps B 2"],
        padded: Int[np.ndarray, "steps 2"],
        *,
        alike: bool,
    ) -> Int[np.ndarray, "*seeds steps widths"] | None:
        """Return the widths of every batch, from the source and target tokens of its rows.

        First the widths of all source and all target tokens, then those of the rows of each group (`groups`). Batches
        of one step have the same widths in all seeds if they have to be `alike`. None is returned where packing saves
        less than its further shapes, or one, take to compile, because tasks share the widths of `padded` rows.
        """
        seeds, _, rows, _ = lengths.shape
        packed = np.maximum(lengths - np.array([self.causal, 0]), 0)
        group_widths = [
            np.take_along_axis(packed, numbers[..., None], axis=2).max(axis=2)
            for numbers in groups(packed)
        ]
        widths = np.concatenate([packed.sum(axis=2), *group_widths], axis=2)
        widths = widths.max(axis=0) if alike else widths
        seeds_together = seeds if alike else 1  # in one program

        def cost(count: Any, *step_widths: Any) -> Any:
            operations = self.operations(*step_shape(rows, *step_widths))
            return seeds_together * count * operations

        few = few_widths(
            widths.reshape(-1, widths.shape[-1]), cost, compile_cost=self.compiling
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


def bucket(length: int) -> int:
    """Return the smallest width of the ladder that holds `length` tokens.

    The ladder: 4, 8, 12, ... 64, from there eight widths an octave: 72, 80, ... 128, 144, 160, ...
    """
    octave = 1 << max(length - 1, 0).bit_length()
    rung = max(octave // 16, 4)
    return max(-(-length // rung), 1) * rung


def few_widths(
    widths: Lengths, cost: Callable[..., Any], *, compile_cost: float = 0.0
) -> Lengths:
    """Return widths of the ladder for each given list of them, none smaller, at most MOST_SHAPES different lists.

    Lists whose first width has one rung share the widest. The list whose items cost least more with the next one's
    widths is left out, while that is less than `compile_cost`, or there are too many. `cost` is that of so many items
    (first argument) of some widths.
    """
    firsts = np.array([bucket(int(first)) for first in widths[:, 0]])
    rungs = np.unique(firsts)
    while True:
        place = np.searchsorted(rungs, firsts)
        counts = np.bincount(place)
        lists = np.array(
            [
                [rung, *map(bucket, widths[place == number, 1:].max(axis=0).tolist())]
                for number, rung in enumerate(rungs.tolist())
            ]
        )
        wider = np.maximum(lists[:-1], lists[1:])
        growths = [
            cost(counts[i] + counts[i + 1], *wider[i])
            - cost(counts[i], *lists[i])
            - cost(counts[i + 1], *lists[i + 1])
            for i in range(len(wider))
        ]
        too_many = len(rungs) > MOST_SHAPES
        if not growths or not too_many and min(growths) >= compile_cost:
            return lists[place]
        rungs = np.delete(rungs, int(np.argmin(growths)))


def unrolling_pays(
    operations: Float[np.ndarray, " programs"],
    times: Int[np.ndarray, " programs"],
    *,
    layers: int,
    width: int,
) -> bool:
    """Return whether unrolled layers save more in a training on a CPU than they take to compile, in little memory.

    Args:
      operations: those of a step of each program.
      times: number of steps of each program.
      layers: number of layers.
      width: d_model.
    """
    compiling = len(operations) * max(layers - SHALLOW, 0) * _UNROLLING
    saves = np.sum(times * operations) > compiling
    return bool(saves and np.max(operations) <= _MOST_OPERATIONS * width)
