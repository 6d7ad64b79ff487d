"""VeRA: random matrices that all sites share stay frozen, and two vectors for each matrix are trained."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..adapters.updates import LowRank
from ..models.architecture import Site
from ..models.weights import Weight
from ..training.problem import Frozen, Method, Params, Projections
from ..training.recipe import Recipe
from .method import Billed, CostLayout, MethodEntry, Update, module

_START = 0.1  # initial value of d, as in PEFT
_PROJECTION_KEY = 0  # the matrices are the same in every run, as in PEFT


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Two vectors for each matrix: dW = (A * d) (B * b), `b` starting at zero.

    Group `vera`: `d`, site -> [L, r], and `b`, site -> [L, d_out].

    Source: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation" (2024), and PEFT.

    Attributes:
      sites: which linear maps, with their shapes.
      rank: r.
    """

    sites: tuple[tuple[str, Site], ...]
    rank: int = 128

    def learning_rates(self, recipe: Recipe) -> dict[str, float]:
        """Return the rate of both vectors."""
        return {"vera": recipe.lr_vera}

    def prepare(self, frozen: Frozen, kernels: Mapping[str, Weight]) -> Frozen:
        """Return the frozen weights with the random matrices."""
        return dataclasses.replace(frozen, projections=self.projections(jax.random.key(_PROJECTION_KEY)))

    def projections(self, key: Array) -> Projections:
        """Return the random matrices, Kaiming uniform as PEFT draws them."""
        widest_in, widest_out = (max(getattr(site, d) for _, site in self.sites) for d in ("d_in", "d_out"))
        bounds = math.sqrt(6 / widest_in), math.sqrt(6 / self.rank)
        shapes = (widest_in, self.rank), (self.rank, widest_out)
        A, B = (
            jax.random.uniform(k, shape, jnp.float32, -bound, bound)
            for k, shape, bound in zip(jax.random.split(key), shapes, bounds, strict=True)
        )
        return Projections(A, B)

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        """Return d at 0.1 and b at zero."""
        d = {name: jnp.full((site.layers, self.rank), _START) for name, site in self.sites}
        return {"vera": {"d": d, "b": {name: jnp.zeros((site.layers, site.d_out)) for name, site in self.sites}}}

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the low-rank adapters; no metrics."""
        assert frozen.projections is not None
        A, B = frozen.projections
        d, b = params["vera"]["d"], params["vera"]["b"]
        return {
            name: LowRank(A[None, : site.d_in] * d[name][:, None], B[None, :, : site.d_out] * b[name][:, None])
            for name, site in self.sites
        }, {}


def _cost_layouts(billed: Billed) -> dict[str, CostLayout]:
    rank = billed.recipe.vera_rank
    layout = CostLayout(
        installed_words=sum(billed.counts.values()),
        matrices=module(rank),
        macs=lambda site: rank + 2 * site.d_out,
        words=lambda site: rank + site.d_out,
        trains_in="arrays",
        stays_in="arrays",
        shared=True,
    )
    return {"VeRA": layout}


ENTRIES = (
    MethodEntry(
        name="vera",
        help="train two vectors for each matrix, between random matrices",
        title="VeRA, rank {vera_rank}",
        build=lambda built: VeRA(sites=built.sites, rank=built.recipe.vera_rank),
        update=lambda recipe, modules: Update(kind="vera", rank=recipe.vera_rank, targets=recipe.lora_targets),
        groups=("vera",),
        cost_layouts=_cost_layouts,
    ),
)
