"""How many numbers each method trains on a base model, without any weights; shapes of common models."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..checks import at_least
from ..io.hf import read_config
from ..models.architecture import Architecture, targeted
from ..models.families import known_shapes
from .parameters import size, trainable


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
    found = trainable(targeted(config, targets), rank=rank, vera_rank=vera_rank)
    coefficients = modules * found.blocks
    return {
        "LoRAFusion": coefficients + found.magnitudes,
        "LoRAFusion, coefficients only": coefficients,
        "LoRAFusion, magnitudes only": found.magnitudes,
        f"LoRA, rank {rank}": found.lora,
        f"DoRA, rank {rank}": found.lora + found.magnitudes,
        f"VeRA, rank {vera_rank}": found.vera,
        "LoraHub": modules,
        "full fine-tuning": size(config),
    }


def shape_config(shape: str) -> Architecture:
    """Return the structure of a known shape, or of the base model in a folder or at a hub id.

    Raises:
      ValueError: a shape that is none of these; and as `read_config` does.
    """
    if shape in known_shapes():
        return known_shapes()[shape]
    if "/" not in shape and not Path(shape).exists():
        raise ValueError(
            f"no shape {shape!r}: choose one of {', '.join(known_shapes())}, "
            "or give the folder or hub id of a base model"
        )
    config = read_config(shape)
    return dataclasses.replace(config, tied=config.presumed_tied)
