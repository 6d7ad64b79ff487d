"""The methods that are billed: which matrices a site gets, where they stand, and what a token does beside them.

Letters: N modules, r rank, R VeRA's rank.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from ...models.architecture import Architecture, Site, targeted
from ..flops import Update
from ..parameters import size, trainable
from .options import CostOptions

Matrix = tuple[int, int]
Place = Literal["arrays", "memory"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How a method adapts a site.

    Attributes:
      update: as `train.cost` counts it.
      trainable: numbers.
      installed_words: those that end in memory.
      matrices: that a site's adapter consists of, A before B.
      macs: digital multiply-adds of a token at a site, at inference.
      words: read from memory for them.
      trains_in: where the adapters are while they are trained.
      stays_in: where they are afterwards.
      passes: times that their cells are written for the task.
      searched: without gradients.
      shared: all sites read the same matrices.
    """

    update: Update
    trainable: int
    installed_words: int
    matrices: Callable[[Site], list[Matrix]] = lambda site: []
    macs: Callable[[Site], int] = lambda site: 0
    words: Callable[[Site], int] = lambda site: 0
    trains_in: Place = "memory"
    stays_in: Place = "memory"
    passes: int = 0
    searched: bool = False
    shared: bool = False


def methods(config: Architecture, options: CostOptions, *, steps: int) -> dict[str, Method]:
    """Return every method by its name.

    Args:
      config: the base model.
      options: ranks, modules and targets.
      steps: of training.

    Raises:
      ValueError: a target that the model does not have.
    """
    N, r, R, targets = options.modules, options.rank, options.vera_rank, options.targets
    found = trainable(targeted(config, targets), rank=r, vera_rank=R)
    lora = Method(
        update=Update(kind="lora", rank=r, targets=targets),
        trainable=found.lora,
        installed_words=0,
        matrices=module(r),
        macs=lambda site: site.d_out,
        stays_in="arrays",
        passes=1,
    )
    pool = Method(
        update=Update(kind="sum", rank=r, modules=N, pool=N, magnitudes=True, targets=targets),
        trainable=N * found.blocks + found.magnitudes,
        installed_words=N * found.blocks + found.magnitudes,
        matrices=lambda site: module(r)(site) * N,
        macs=lambda site: N * (r + site.d_out) + site.d_out,
        words=lambda site: N + site.d_out,
        trains_in="arrays",
        stays_in="arrays",
    )
    digital = size(config) - sum(d_in * d_out * layers for (d_in, d_out), layers in base_matrices(config))
    return {
        "LoRA in cells": lora,
        "LoRA in cells, every step": dataclasses.replace(lora, trains_in="arrays", passes=steps),
        "LoRA in SRAM": dataclasses.replace(
            lora,
            installed_words=found.lora,
            macs=lambda site: r * (site.d_in + site.d_out) + site.d_out,
            words=lambda site: r * (site.d_in + site.d_out),
            stays_in="memory",
            passes=0,
        ),
        "DoRA in cells": dataclasses.replace(
            lora,
            update=dataclasses.replace(lora.update, kind="dora"),
            trainable=found.lora + found.magnitudes,
            installed_words=found.magnitudes,
            macs=lambda site: 2 * site.d_out,
            words=lambda site: site.d_out,
        ),
        "VeRA": Method(
            update=Update(kind="vera", rank=R, targets=targets),
            trainable=found.vera,
            installed_words=found.vera,
            matrices=module(R),
            macs=lambda site: R + 2 * site.d_out,
            words=lambda site: R + site.d_out,
            trains_in="arrays",
            stays_in="arrays",
            shared=True,
        ),
        "LoraHub": dataclasses.replace(
            pool,
            update=Update(kind="mix", rank=r, modules=N, pool=N, targets=targets),
            trainable=N,
            installed_words=N,
            macs=lambda site: N * (2 * r + site.d_out),
            words=lambda site: N,
            searched=True,
        ),
        "full fine-tuning": Method(
            update=Update(kind="full"), trainable=size(config), installed_words=digital, passes=1
        ),
        "LoRAFusion": pool,
        "LoRAFusion, side by side": dataclasses.replace(
            pool, matrices=side_by_side(N, r), macs=lambda site: N * r + 2 * site.d_out
        ),
    }


def module(rank: int) -> Callable[[Site], list[Matrix]]:
    """Return the A and B of one module at a site."""
    return lambda site: [(site.d_in, rank), (rank, site.d_out)]


def side_by_side(modules: int, rank: int) -> Callable[[Site], list[Matrix]]:
    """Return the modules' A beside each other along columns, their B along rows, whose outputs add up in the array."""
    return module(modules * rank)


def base_matrices(config: Architecture) -> list[tuple[Matrix, int]]:
    """Return the matrices that sit in arrays, and how often each shape occurs."""
    found = [((site.d_in, site.d_out), site.layers) for site in config.sites.values()]
    return found if config.tied else [*found, (config.head, 1)]
