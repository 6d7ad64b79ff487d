"""Number of trained numbers of each method on a base model, without any weights; shapes of common models."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..checks import at_least
from ..io.hf import read_config
from ..methods import METHODS
from ..methods.entry import WITH_CORE, PlannedPool
from ..methods.recipes import recipe_of
from ..models.architecture import Architecture
from ..models.registry import known_shapes
from .parameters import trainable_count


def counts(
    config: Architecture,
    *,
    modules: int = 20,
    rank: int = 16,
    vera_rank: int = 128,
    basis: int | None = 32,
    targets: Sequence[str] | None = None,
) -> dict[str, int]:
    """Return how many numbers each method trains.

    LoRAFusion's coefficients are one for each module and block. In a shared basis there are as many, and a core adds
    basis^2 numbers for each adapted matrix.

    Args:
      config: the base model.
      modules: that are fused.
      rank: of LoRA and DoRA.
      vera_rank: of VeRA, whose two random matrices all sites share.
      basis: number of directions of a shared basis; None for no rows of one.
      targets: the linear maps that are adapted.

    Raises:
      ValueError: a count below one, a target that the model does not have, or more directions than a matrix has.
    """
    at_least(1, modules=modules, rank=rank, vera_rank=vera_rank, **({} if basis is None else {"basis": basis}))
    maps = None if targets is None else tuple(targets)
    numbers = {"modules": modules, "lora_rank": rank, "vera_rank": vera_rank, "lora_targets": maps}
    fused, found = PlannedPool(rank=rank, pool=modules, targets=maps), {}
    for entry in METHODS.values():
        recipe = recipe_of(entry.recipe, numbers)
        asked = {} if entry.title is None else {entry.title.format(**vars(recipe)): recipe}
        if entry.basis_title is not None and basis is not None:
            for core in (False, True):
                in_basis = recipe_of(entry.recipe, vars(recipe) | {"basis": basis, "train_core": core})
                asked[entry.basis_title.format(basis=basis) + (WITH_CORE if core else "")] = in_basis
        found |= {title: sum(trainable_count(entry, config, of, fused).values()) for title, of in asked.items()}
    return found


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
