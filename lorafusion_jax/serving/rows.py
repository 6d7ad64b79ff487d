"""Updates of a linear map that differ from row to row of a batch, for all rows in the same products.

`RowAdapter` is called with (x, kernel), as updates of `adapters.updates` are, and the first axis of x is the rows'.
Under a scan over layers every array has a leading axis of layers.

Axis letters: B rows of a batch, N modules, r rank, k directions of a basis.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..models.weights import Weight, matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowModules:
    """Modules that every row mixes with its own coefficients.

    Attributes:
      A: [d_in, N r], the modules side by side; [N, d_in, r] if they are read one by one.
      B: [N r, d_out], or [N, r, d_out].
      coefficients: [B, N, 1], or [B, N, r] to weigh every rank separately.
      mixes: [B], whether a row mixes x A_n before the products with B_n (`mix`), or the products alone (`sum`).
      one_by_one: if true, every module is in separate arrays.
    """

    A: Weight
    B: Weight
    coefficients: Float[Array, "*L B N k"]
    mixes: Bool[Array, "*L B"]
    one_by_one: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "B *T d_in"]) -> Float[Array, "B *T d_out"]:
        """Return `x dW`."""
        c = jnp.expand_dims(self.coefficients.astype(x.dtype), range(1, x.ndim - 1))
        if self.one_by_one:
            read = jnp.moveaxis(jax.vmap(matmul, in_axes=(None, 0))(x, self.A), 0, -2)
        else:
            read = matmul(x, self.A).reshape(*x.shape[:-1], c.shape[-2], -1)
        weighted = read * c
        mixed = jnp.sum(weighted, axis=-2, keepdims=True) * c
        inner = jnp.where(
            jnp.expand_dims(self.mixes, range(1, read.ndim)), mixed, weighted
        )
        if not self.one_by_one:
            return matmul(inner.reshape(*x.shape[:-1], -1), self.B)
        outputs = jax.vmap(matmul)(jnp.moveaxis(inner, -2, 0), self.B)
        # Converters may return an offset for zeros: a module that a row does not mix is not read for it.
        used = jnp.moveaxis(jnp.any(c != 0, axis=-1, keepdims=True), -2, 0)
        return jnp.sum(jnp.where(used, outputs, jnp.zeros_like(outputs)), axis=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowCores:
    """A shared basis U [d_in, k], V [k, d_out] in which every row has its own core [B, k, k]."""

    U: Weight
    V: Weight
    core: Float[Array, "*L B k k"]

    def __call__(self, x: Float[Array, "B *T d_in"]) -> Float[Array, "B *T d_out"]:
        """Return `x dW`."""
        update = matmul(
            jnp.einsum(
                "b...i,bij->b...j", matmul(x, self.U), self.core.astype(x.dtype)
            ),
            self.V,
        )
        # Converters may return an offset for zeros: for a row that mixes nothing, V is not read.
        used = jnp.any(self.core != 0, axis=(1, 2))
        return jnp.where(
            jnp.expand_dims(used, range(1, x.ndim)), update, jnp.zeros((), x.dtype)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowAdapter:
    """An adapter of every row: `(x W + x dW) * scale`; without modules dW is 0, without a scale [B, d_out] it is 1."""

    modules: RowModules | RowCores | None
    scale: Float[Array, "*L B d_out"] | None

    def __call__(
        self, x: Float[Array, "B *T d_in"], kernel: Weight
    ) -> Float[Array, "B *T d_out"]:
        """Return the adapted product."""
        y = matmul(x, kernel)
        if self.modules is not None:
            y = y + self.modules(x)
        if self.scale is None:
            return y
        return y * jnp.expand_dims(self.scale.astype(y.dtype), range(1, y.ndim - 1))
