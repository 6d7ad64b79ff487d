"""VeRA: random matrices that all sites share stay frozen, and two vectors for each matrix are trained."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..adapters.updates import LowRank
from ..models.architecture import Site
from .method import Frozen, Params, Projections

_START = 0.1  # of d, PEFT's


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA:
    """Two vectors for each matrix: dW = (A * d) (B * b), `b` starting at zero.

    Group `vera`: `d`, site -> [L, r], and `b`, site -> [L, d_out].

    Source: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation" (2024), and PEFT.

    Attributes:
      sites: which linear maps, with their shapes.
      rank: r.
    """

    sites: tuple[tuple[str, Site], ...]
    rank: int = 128

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

    def trainable(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        """Return that every number counts."""
        return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
