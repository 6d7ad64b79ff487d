"""How many numbers a model has, and how many a method trains on some of its linear maps, without any weights."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from flax import nnx

from ..models.sites import Site
from ..models.t5.model import T5, T5Config


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
        blocks=sum({name.partition(".")[0]: site.layers for name, site in adapted.items()}.values()),
        magnitudes=sum(site.d_out for site in matrices),
        lora=sum(rank * (site.d_in + site.d_out) for site in matrices),
        vera=sum(vera_rank + site.d_out for site in matrices),
    )


@functools.cache
def size(config: T5Config) -> int:
    """Return how many numbers the model has."""
    model = nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
