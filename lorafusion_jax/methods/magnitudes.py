"""Magnitudes alone: the columns of the base's own matrices are rescaled, and no pool is needed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..adapters.updates import Rescaled
from .method import Frozen, Params


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """LoRAFusion's magnitudes without its coefficients: y = m / ||W|| * x W.

    Group `magnitudes`: site -> [L, d_out], from ||W||.
    """

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        """Return the columns' norms."""
        assert frozen.norms is not None
        return {"magnitudes": frozen.norms}

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return what rescales the sites; no metrics."""
        assert frozen.norms is not None
        return {site: Rescaled(m / frozen.norms[site]) for site, m in params["magnitudes"].items()}, {}

    def trainable(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        """Return that every number counts."""
        return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
