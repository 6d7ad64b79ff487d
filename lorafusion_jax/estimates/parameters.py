"""How many numbers a model has, and how many a method trains on some of its linear maps, without any weights."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from flax import nnx

from ..models.architecture import Architecture, Site, stack_of
from ..models.families import abstract_model


class Trainable(NamedTuple):
    """Numbers that are trained on adapted sites.

    Attributes:
      matrices: adapted, layer by layer.
      blocks: that hold one of them.
      magnitudes: one for each column (LoRAFusion's, DoRA's).
      lora: of one LoRA.
      vera: two vectors a matrix, of VeRA's rank and of d_out (PEFT counts the same).
    """

    matrices: int
    blocks: int
    magnitudes: int
    lora: int
    vera: int


def trainable(adapted: Mapping[str, Site], *, rank: int, vera_rank: int) -> Trainable:
    """Return what is trained on the adapted sites, by LoRAs of a rank and VeRAs of another."""
    matrices = [site for site in adapted.values() for _ in range(site.layers)]
    return Trainable(
        matrices=len(matrices),
        blocks=sum({stack_of(name): site.layers for name, site in adapted.items()}.values()),
        magnitudes=sum(site.d_out for site in matrices),
        lora=sum(rank * (site.d_in + site.d_out) for site in matrices),
        vera=sum(vera_rank + site.d_out for site in matrices),
    )


@functools.cache
def size(config: Architecture) -> int:
    """Return how many numbers the model has."""
    model = abstract_model(config)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
