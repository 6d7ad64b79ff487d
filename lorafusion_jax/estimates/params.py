"""Number of trained numbers of each method on a base model, without any weights; shapes of common models."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..checks import at_least
from ..io.hf import read_config
from ..methods import METHODS
from ..methods.method import Fused
from ..models.architecture import Architecture
from ..models.families import known_shapes
from ..training.recipe import Recipe
from .parameters import trainable_count


def counts(
    config: Architecture,
    *,
    modules: int = 20,
    rank: int = 16,
    vera_rank: int = 128,
    targets: Sequence[str] | None = None,
) -> dict[str, int]:
    """Return how many numbers each method trains.

    LoRAFusion's coefficients are one for each module and block.

    Args:
      config: the base model.
      modules: that are fused.
      rank: of LoRA and DoRA.
      vera_rank: of VeRA, whose two random matrices all sites share.
      targets: the linear maps that are adapted.

    Raises:
      ValueError: a count below one, or a target that the model does not have.
    """
    at_least(1, modules=modules, rank=rank, vera_rank=vera_rank)
    maps = None if targets is None else tuple(targets)
    recipe = Recipe(modules=modules, lora_rank=rank, vera_rank=vera_rank, lora_targets=maps)
    fused = Fused(rank=rank, pool=modules, targets=maps)
    return {
        entry.title.format(rank=rank, vera_rank=vera_rank): sum(trainable_count(entry, config, recipe, fused).values())
        for entry in METHODS.values()
        if entry.title is not None
    }


def shape_config(shape: str) -> Architecture:
    """Return the structure of a known shape, or of the base model in a folder, at a hub id or in a GGUF file.

    Raises:
      ValueError: a shape that is none of these; and as `read_config` does.
    """
    if shape in known_shapes():
        return known_shapes()[shape]
    if "/" not in shape and not Path(shape).exists():
        raise ValueError(
            f"no shape {shape!r}: choose one of {', '.join(known_shapes())}, "
            "or give the folder, hub id or GGUF file of a base model"
        )
    config = read_config(shape)
    return dataclasses.replace(config, tied=config.presumed_tied)
