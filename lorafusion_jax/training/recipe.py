"""A recipe: the numbers of a training that all methods share. Every method adds its own in its file.

What of a recipe a step is compiled for, and what may be swept, are here too.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

from jaxtyping import Array, Float

from ..checks import at_least, one_of
from ..tasks.protocol import Protocol

Schedule = Literal["constant", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Static settings of the training.

    Attributes:
      steps: in all; the schedule's length.
      schedule: of the learning rates: `constant`, or `cosine` to zero.
      warmup: steps of linear warm-up.
      clip: global norm above which gradients are scaled down; None for never.
      patience: epochs without a better validation loss after which a seed stops; None for never.
      patience_from: epochs before which none is counted.
      prune: share of the smallest magnitudes that are set to zero at half time and kept there.

    Raises:
      ValueError: there is no such schedule, the warm-up has fewer steps than 0, or the norm to clip at is not above 0.
    """

    steps: int
    schedule: Schedule = "constant"
    warmup: int = 0
    clip: float | None = None
    patience: int | None = None
    patience_from: int = 0
    prune: float = 0.0

    def __post_init__(self) -> None:
        one_of(get_args(Schedule), schedule=self.schedule)
        at_least(0, warmup=self.warmup)
        if self.clip is not None and not self.clip > 0:  # a negative norm would turn the gradients around
            raise ValueError(f"clip is {self.clip}: wanted a norm above 0, or None for no clipping")


class Rates(NamedTuple):
    """The part of the optimisation that may be swept as arrays.

    Attributes:
      learning_rate: by group of trainable numbers.
      l2: added to the coefficients' gradient as l2 * c (coupled, as torch's Adam does).
      l1: weight of mean |c| in the objective.
    """

    learning_rate: dict[str, Float[Array, ""]]
    l2: Float[Array, ""]
    l1: Float[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of a training that all methods share. The recipe of a method is a subclass with the method's own numbers.

    Attributes:
      epochs: passes over the training rows.
      batch_size: rows in a step.
      schedule: learning rates over the steps: `constant`, or `cosine` to zero.
      warmup: steps of linear warm-up.
      clip: global norm above which gradients are scaled down; None for never.
      stop_early: stop a seed after epochs / 3 without a better validation loss, counted from epochs / 5 on.
      protocol: `reference` splits and orders the rows as the paper's code; `default` by seed.
      max_new_tokens: most tokens of an answer; None for twice the longest training target.
    """

    epochs: int = 20
    batch_size: int = 10
    schedule: Schedule = "cosine"
    warmup: int = 0
    clip: float | None = 1.0
    stop_early: bool = False
    protocol: Protocol = "default"
    max_new_tokens: int | None = None

    @property
    def penalties(self) -> tuple[float, float]:
        """L1 and L2 of the coefficients, of a method that has some."""
        return 0.0, 0.0

    def check(self) -> None:
        """Raise ValueError for numbers that no training of the method can use."""
        at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        if self.max_new_tokens is not None:
            at_least(1, max_new_tokens=self.max_new_tokens)
        self.optimisation(1)  # raises ValueError for what no training has

    def optimisation(self, steps: int) -> Optimisation:
        """Return the static part of the optimisation over `steps` steps."""
        return Optimisation(
            steps=steps,
            schedule=self.schedule,
            warmup=self.warmup,
            clip=self.clip,
            patience=max(self.epochs // 3, 1) if self.stop_early else None,
            patience_from=self.epochs // 5,
        )
