"""VeRA: random matrices that all sites share stay frozen, and two vectors for each matrix are trained."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..adapters.updates import LowRank
from ..models.architecture import Site
from ..models.weights import Weight
from ..support.options import SharedMatricesOptions
from ..training.method import Adapted, Frozen, Index, Method, Params
from .entry import CostLayout, MethodEntry, TargetedRecipe, module

_START = 0.1  # initial value of d, as in PEFT
_PROJECTION_KEY = 0  # the matrices are the same in every run, as in PEFT


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRARecipe(SharedMatricesOptions, TargetedRecipe):
    """Recipe of VeRA.

    Attributes:
      lr_vera: learning rate of the vectors.
    """

    lr_vera: float = 0.03


class Projections(NamedTuple):
    """Random matrices; a site uses the first rows of A and the first columns of B."""

    A: Float[Array, "*C widest_in r"]
    B: Float[Array, "*C r widest_out"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Two vectors for each matrix: dW = (A * d) (B * b), `b` starting at zero.

    Group `vera`: `d`, site -> [L, r], and `b`, site -> [L, d_out].

    Source: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation" (2024), and PEFT.

    Attributes:
      sites: adapted linear maps.
      rank: r.
    """

    sites: tuple[tuple[str, Site], ...]
    rank: int = 128

    def precompute(self, frozen: Frozen, kernels: Mapping[str, Weight]) -> Frozen:
        return dataclasses.replace(
            frozen, precomputed=self.projections(jax.random.key(_PROJECTION_KEY))
        )

    def projections(self, key: PRNGKeyArray) -> Projections:
        """Return the random matrices, Kaiming uniform as PEFT draws them."""
        widest_in = max((site.d_in for _, site in self.sites))
        widest_out = max((site.d_out for _, site in self.sites))
        bound_a = math.sqrt(6 / widest_in)
        bound_b = math.sqrt(6 / self.rank)
        key_a, key_b = jax.random.split(key)
        shape_a = (widest_in, self.rank)
        shape_b = (self.rank, widest_out)
        A = jax.random.uniform(key_a, shape_a, jnp.float32, -bound_a, bound_a)
        B = jax.random.uniform(key_b, shape_b, jnp.float32, -bound_b, bound_b)
        return Projections(A, B)

    def init(self, frozen: Frozen, index: Index, key: PRNGKeyArray) -> Params:
        d = {
            name: jnp.full((site.layers, self.rank), _START)
            for name, site in self.sites
        }
        return {
            "vera": {
                "d": d,
                "b": {
                    name: jnp.zeros((site.layers, site.d_out))
                    for name, site in self.sites
                },
            }
        }

    def adapters(self, params: Params, frozen: Frozen, index: Index) -> Adapted:
        A, B = frozen.precomputed
        d = params["vera"]["d"]
        b = params["vera"]["b"]
        return {
            name: LowRank(
                A[None, : site.d_in] * d[name][:, None],
                B[None, :, : site.d_out] * b[name][:, None],
            )
            for name, site in self.sites
        }, {}


ENTRIES = (
    MethodEntry(
        name="vera",
        help="train two vectors for each matrix, between random matrices",
        title="VeRA, rank {vera_rank}",
        build=lambda built: VeRA(sites=built.sites, rank=built.recipe.vera_rank),
        recipe=VeRARecipe,
        groups=("vera",),
        cost_layouts=lambda recipe, rank: {
            "VeRA": CostLayout(matrices=module(recipe.vera_rank), trains_in_arrays=True)
        },
    ),
)
