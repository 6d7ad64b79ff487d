"""A low-rank update that is itself in training, under magnitudes: DoRA.

A frozen pool's Gram terms are computed once (`compose.Gram`); here A changes with every step, and the norm is formed
where the kernel is at hand.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..models.weights import Weight, dense, matmul
from .composition import column_norm, product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dora:
    """One update under magnitudes: `m / ||W + A B|| * x (W + A B)`, the norm taken as constant.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), and PEFT.

    Attributes:
      A: [d_in, r], under a scan over layers [L, d_in, r].
      B: [r, d_out], the scaling folded in.
      magnitude: [d_out].
    """

    A: Float[Array, "*L d_in r"]
    B: Float[Array, "*L r d_out"]
    magnitude: Float[Array, "*L d_out"]

    def __call__(self, x: Float[Array, "*B d_in"], kernel: Weight) -> Float[Array, "*B d_out"]:
        """Return the adapted product."""
        W = dense(kernel, jnp.float32)
        squared = jnp.sum(jnp.square(W), axis=0)
        cross = 2 * jnp.sum(product(self.A.T, W) * self.B, axis=0)
        of_update = jnp.sum(self.B * product(product(self.A.T, self.A), self.B), axis=0)
        norm, _ = column_norm(squared, cross, of_update)
        scale = (self.magnitude / jax.lax.stop_gradient(norm)).astype(x.dtype)
        y = matmul(x, kernel) + matmul(matmul(x, self.A), self.B)
        return y * jnp.expand_dims(scale, range(y.ndim - 1))
