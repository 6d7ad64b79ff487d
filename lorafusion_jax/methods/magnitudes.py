"""Magnitudes alone: the columns of the base's own matrices are rescaled, and no pool is needed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..models.weights import Weight, matmul
from .method import Frozen, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rescaled:
    """`x W * scale`.

    Attributes:
      scale: [d_out], under a scan over layers [L, d_out].
    """

    scale: Float[Array, "*L d_out"]

    def __call__(self, x: Float[Array, "*B d_in"], kernel: Weight) -> Float[Array, "*B d_out"]:
        """Return the rescaled product."""
        y = matmul(x, kernel)
        return y * jnp.expand_dims(self.scale.astype(y.dtype), range(y.ndim - 1))


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
