"""A recipe: every number of fusion and training, the presets, and what of it a step is compiled for or may be swept."""

import dataclasses
from typing import Literal, NamedTuple, get_args

from jaxtyping import Array, Float

from ..adapters.coefficients import Granularity, Start
from ..adapters.merges import MergeKind
from ..adapters.updates import Composition
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
    """Numbers of a fusion and its training.

    Attributes:
      modules: number of modules of the pool that a seed fuses; all of a smaller pool.
      choose: choice of the modules: `draw` them by seed, or rank the whole pool by one backward pass over the training
        rows at zero coefficients, `gradient`; with a basis that ranks whole modules, and `basis-gradient` ranks them
        inside it.
      composition: combination of the modules: `sum` is sum c A B, `mix` is (sum c A)(sum c B).
      basis: fuse the modules in the first so many directions of the pool's stored basis (`lorafusion convert --basis`);
        None for whole modules.
      core: also train a matrix [basis, basis] at every site, added to the mixed modules.
      granularity: coefficients of a module: one (`global`), or one for each `block`, each `site` (adapted matrix) or
        each `rank` of a site.
      start: initial coefficients: 1 / N (`uniform`), 2 / N (`twice`), `zeros`, or drawn as in the paper's code
        (`xavier`).
      differentiate_norm: let gradients flow through the magnitudes' norm.
      epochs: passes over the training rows.
      batch_size: rows in a step.
      lr_coefficients: learning rate of the coefficients.
      lr_magnitudes: learning rate of the magnitudes.
      lr_core: learning rate of the matrices in a basis.
      lr_lora: learning rate of the LoRA and DoRA baselines' matrices.
      lr_vera: learning rate of VeRA's vectors.
      lr_full: learning rate of full fine-tuning.
      l2: share of the coefficients that is added to their gradient.
      l1: weight of mean |c| in the objective.
      schedule: learning rates over the steps: `constant`, or `cosine` to zero.
      warmup: steps of linear warm-up.
      clip: global norm above which gradients are scaled down; None for never.
      stop_early: stop a seed after epochs / 3 without a better validation loss, counted from epochs / 5 on.
      prune: share of the smallest magnitudes that are set to zero at half time and kept there.
      protocol: `reference` splits and orders the rows as the paper's code; `default` by seed.
      max_new_tokens: most tokens of an answer; None for twice the longest training target.
      lora_rank: rank of the LoRA and DoRA baselines, whose alpha is twice that.
      lora_targets: the linear maps that LoRA, DoRA, VeRA and magnitudes alone adapt; by default the model family's
        own choice.
      vera_rank: rank of VeRA's random matrices.
      evaluations: number of evaluations in LoraHub's search.
      generations: number of generations of CMA-ES.
      population: members of a generation of CMA-ES.
      shots: number of examples in a few-shot prompt.
      merge: PEFT's rule, for the method `merge`, with all modules at 1 / N.
      density: share of the entries that ties, dare and magnitude_prune keep.
    """

    modules: int = 20
    choose: Literal["draw", "gradient", "basis-gradient"] = "draw"
    composition: Composition = "sum"
    basis: int | None = None
    core: bool = False
    granularity: Granularity = "block"
    start: Start = "uniform"
    differentiate_norm: bool = False
    epochs: int = 20
    batch_size: int = 10
    lr_coefficients: float = 0.1
    lr_magnitudes: float = 0.01
    lr_core: float = 2e-3
    lr_lora: float = 2e-3
    lr_vera: float = 0.03
    lr_full: float = 2e-4
    l2: float = 0.0
    l1: float = 0.0
    schedule: Schedule = "cosine"
    warmup: int = 0
    clip: float | None = 1.0
    stop_early: bool = False
    prune: float = 0.0
    protocol: Protocol = "default"
    max_new_tokens: int | None = None
    lora_rank: int = 16
    lora_targets: tuple[str, ...] | None = None
    vera_rank: int = 128
    evaluations: int = 40
    generations: int = 40
    population: int = 16
    shots: int = 5
    merge: MergeKind = "linear"
    density: float = 0.5

    def optimisation(self, steps: int) -> Optimisation:
        """Return the static part of the optimisation over `steps` steps."""
        return Optimisation(
            steps=steps,
            schedule=self.schedule,
            warmup=self.warmup,
            clip=self.clip,
            patience=max(self.epochs // 3, 1) if self.stop_early else None,
            patience_from=self.epochs // 5,
            prune=self.prune,
        )


PRESETS = {
    "default": Recipe(),
    # The protocol of the paper's published code, in every number.
    "reference": Recipe(
        composition="mix",
        start="xavier",
        lr_coefficients=0.02,
        lr_magnitudes=0.005,
        l2=1e-5,
        l1=5e-4,
        schedule="constant",
        clip=None,
        stop_early=True,
        protocol="reference",
        max_new_tokens=256,
    ),
}
