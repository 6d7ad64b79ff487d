"""A recipe, the settings of a training, in three parts.

`Optimisation` is what a step is compiled for, `Rates` are arrays that can be swept, and `Recipe` has all settings that
methods share.
"""

import dataclasses
from typing import Literal, get_args

from jaxtyping import Array

from ..support.checks import at_least, one_of
from ..support.options import StepsOptions
from ..tasks.protocol import Protocol

Schedule = Literal["constant", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Static settings of the training.

    Attributes:
      steps: length of the schedule.
      schedule: learning rates over the steps: `constant`, or `cosine` to zero.
      warmup: steps of linear warm-up.
      clip: global norm above which gradients are scaled down; None for never.
      patience: epochs without a better validation loss after which a seed stops; None for never.
      patience_from: first epoch that is counted.
      prune: share of the smallest magnitudes that are set to zero at half time and kept there.
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
        if (
            self.clip is not None and not self.clip > 0
        ):  # a negative norm would turn the gradients around
            raise ValueError(
                f"clip is {self.clip}: give a norm above 0, or None for no clipping"
            )


# Learning rate of each group of trainable parameters, which may be swept as arrays.
Rates = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(StepsOptions):
    """Settings of a training that all methods share. The recipe of a method is a subclass with its own settings.

    Attributes:
      pack: compute the rows of a step behind each other, without most of the padding. The loss is the same, except
        for rounding.
      schedule: learning rates over the steps: `constant`, or `cosine` to zero.
      warmup: steps of linear warm-up.
      clip: global norm above which gradients are scaled down; None for never.
      stop_early: stop a seed after epochs / 3 without a better validation loss, counted from epochs / 5 on.
      protocol: `reference` splits and orders the rows as the paper's code; `default` by seed.
      max_new_tokens: most tokens of an answer; None for twice the longest training target.
    """

    pack: bool = True
    schedule: Schedule = "cosine"
    warmup: int = 0
    clip: float | None = 1.0
    stop_early: bool = False
    protocol: Protocol = "default"
    max_new_tokens: int | None = None

    def check(self) -> None:
        """Raise ValueError for settings that training cannot use. Whole numbers, except `warmup`, are at least 1."""
        rates = {
            name: value for name, value in vars(self).items() if name.startswith("lr_")
        }
        at_least(0, warmup=self.warmup, **rates)
        at_least(
            1,
            **{
                name: value
                for name, value in vars(self).items()
                if type(value) is int and name != "warmup"
            },
        )
        self.optimisation(1)  # raises ValueError for settings without a meaning

    def optimisation(self, steps: int) -> Optimisation:
        """Return the static part of the optimisation over `steps` steps."""
        return Optimisation(
            steps=steps,
            schedule=self.schedule,
            warmup=self.warmup,
            clip=self.clip,
            patience=max(self.epochs // 3, 1) if self.stop_early else None,
            patience_from=self.epochs // 5 if self.stop_early else 0,
        )
