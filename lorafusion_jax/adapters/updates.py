"""Updates of a linear map: the forms that replace `models.weights.matmul(x, W)` at an adapted site.

Each is called with (x [..., d_in], kernel [d_in, d_out]) and returns the adapted product. Its arrays are stacked over
the layers of its site, a first axis that the shapes below leave out; a scan passes one layer at a time. `scale`
[d_out] multiplies the columns; None is 1.

Axis letters: L layer, N adapters of a fusion, P adapters of the pool, r rank.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int
from qwix import QArray

from ..models.architecture import Model, kernels
from ..models.layers import widened
from ..models.weights import (
    FEW,
    SUM,
    Weight,
    at_layer,
    dense,
    is_in_arrays,
    matmul,
    summed,
)
from .norms import column_norm, product

Composition = Literal["mix", "sum"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """One low-rank update: `(x W + x A B) * scale`, A [d_in, r], B [r, d_out]."""

    A: Weight
    B: Weight
    scale: Array | None = None

    def __call__(
        self, x: Float[Array, "*B d_in"], kernel: Weight
    ) -> Float[Array, "*B d_out"]:
        read = checkpoint_name(matmul(x, self.A), SUM)
        return _scaled(matmul(x, kernel) + matmul(read, self.B), self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rescaled:
    """Rescaled columns without an update: `x W * scale`."""

    scale: Float[Array, "*L d_out"]

    def __call__(
        self, x: Float[Array, "*B d_in"], kernel: Weight
    ) -> Float[Array, "*B d_out"]:
        return _scaled(matmul(x, kernel), self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightDecomposed:
    """One update with magnitudes: `m / ||W + A B|| * x (W + A B)`, where the norm is treated as constant.

    The scaling is folded into B. Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), and PEFT.
    """

    A: Float[Array, "*L d_in r"]
    B: Float[Array, "*L r d_out"]
    magnitude: Float[Array, "*L d_out"]

    def __call__(
        self, x: Float[Array, "*B d_in"], kernel: Weight
    ) -> Float[Array, "*B d_out"]:
        return self.rescaled(kernel)(x, kernel)

    def rescaled(self, kernel: Weight) -> LowRank:
        """Return the update of one layer with its norms computed."""
        W = dense(kernel, jnp.float32)
        squared = jnp.sum(jnp.square(W), axis=0)
        cross = 2 * jnp.sum(product(self.A.T, W) * self.B, axis=0)
        squared_update = jnp.sum(
            self.B * product(product(self.A.T, self.A), self.B), axis=0
        )
        norm, _ = column_norm(squared, cross, squared_update)
        return LowRank(self.A, self.B, self.magnitude / jax.lax.stop_gradient(norm))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """One update as a whole matrix: `x (W + dW) * scale`.

    dW is formed for all layers, so it is used only where it is not larger than the modules' factors. With `apart`, few
    rows are multiplied by both matrices, which takes less time than adding these for every token.
    """

    delta: Float[Array, "*L d_in d_out"]
    scale: Array | None = None
    apart: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(
        self, x: Float[Array, "*B d_in"], kernel: Weight
    ) -> Float[Array, "*B d_out"]:
        if is_in_arrays(kernel) or (self.apart and x.size <= FEW * x.shape[-1]):
            return _scaled(matmul(x, kernel) + matmul(x, self.delta), self.scale)
        return _scaled(matmul(x, dense(kernel, jnp.float32) + self.delta), self.scale)


def matrix_is_faster(tokens: int, d_in: int, k: int, d_out: int) -> bool:
    """Return whether a step takes fewer operations with a sum that is formed already than with products of rank k."""
    return (tokens + k) * d_in * d_out < 2 * tokens * k * (d_in + d_out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Modules:
    """A sum of products, as one update of rank N r: `(x W + sum_n c_n x A_n B_n) * scale`.

    The modules are gathered from the pool layer by layer inside the scan, so that seeds with different draws share
    one pool in memory.

    Attributes:
      A: [P, d_in, r].
      B: [P, r, d_out].
      index: positions of the modules.
      coefficients: [N, 1], or [N, r] to weigh every rank separately.
      delta: the sum as a matrix, which replaces the products where these would take more operations.
    """

    A: Weight
    B: Weight
    index: Int[Array, "*L N"]
    coefficients: Float[Array, "*L N k"]
    scale: Array | None = None
    delta: Float[Array, "*L d_in d_out"] | None = None

    def __call__(
        self, x: Float[Array, "*B d_in"], kernel: Weight
    ) -> Float[Array, "*B d_out"]:
        # Added to weights in bfloat16, a small update would be rounded away.
        if (
            self.delta is not None
            and x.dtype == jnp.float32
            and not is_in_arrays(kernel)
        ):
            d_in, d_out = self.delta.shape
            if matrix_is_faster(
                x.size // d_in, d_in, self.index.size * self.A.shape[-1], d_out
            ):
                return Dense(self.delta, self.scale)(x, kernel)
        A = dense(gather(self.A, self.index), x.dtype)
        B = dense(gather(self.B, self.index), x.dtype)
        coefficients = jnp.expand_dims(
            self.coefficients.astype(x.dtype), range(x.ndim - 1)
        )
        if x.dtype == jnp.bfloat16:
            # XLA's fast products on a CPU have float32 results, which `matmul` asks for.
            reads = matmul(x, jnp.swapaxes(A, 0, 1).reshape(A.shape[1], -1))
            reads = reads.reshape(*x.shape[:-1], A.shape[0], A.shape[2])
            mixed = checkpoint_name(reads, SUM) * coefficients
            update = matmul(mixed.reshape(*x.shape[:-1], -1), B.reshape(-1, B.shape[2]))
        else:
            reads = checkpoint_name(jnp.einsum("...i,nir->...nr", x, A), SUM)
            update = jnp.einsum("...nr,nro->...o", reads * coefficients, B)
        return _scaled(matmul(x, kernel) + update, self.scale)

    def low_rank(self) -> LowRank:
        """Return the sum over all layers as one update, quantised if the modules are."""
        A, B = side_by_side(
            *(jax.vmap(gather)(w, self.index) for w in (self.A, self.B))
        )
        layers, N, _ = self.coefficients.shape
        c = jnp.broadcast_to(self.coefficients, (layers, N, B.shape[1] // N)).reshape(
            layers, -1, 1
        )
        if isinstance(B, QArray):
            weighted = dataclasses.replace(B, scale=B.scale * c)
        else:
            weighted = dense(B, c.dtype) * c
        return LowRank(A, weighted, self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """Modules in separate arrays, mixed in their outputs: every A_n and B_n is read on its own.

    A, B and index are as in `Modules`; the coefficients are zero where a module lacks a rank.
    """

    A: Weight
    B: Weight
    index: Int[Array, "*L N"]
    coefficients: Float[Array, "*L N r"]
    composition: Composition = dataclasses.field(metadata={"static": True})
    scale: Array | None = None

    def __call__(
        self, x: Float[Array, "*B d_in"], kernel: Weight
    ) -> Float[Array, "*B d_out"]:
        A = gather(self.A, self.index)
        B = gather(self.B, self.index)
        c = jnp.expand_dims(self.coefficients.astype(x.dtype), range(1, x.ndim))
        reads = jax.vmap(matmul, in_axes=(None, 0))(x, A) * c
        if self.composition == "mix":
            reads = jnp.sum(reads, axis=0)[None] * c
        return _scaled(
            matmul(x, kernel) + jnp.sum(jax.vmap(matmul)(reads, B), axis=0), self.scale
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InBasis:
    """One update between shared directions in arrays: `(x W + ((x U) core) V) * scale`; the core is digital."""

    U: Weight
    V: Weight
    core: Float[Array, "*L k k"]
    scale: Array | None = None

    def __call__(
        self, x: Float[Array, "*B d_in"], kernel: Weight
    ) -> Float[Array, "*B d_out"]:
        mixed = jnp.dot(matmul(x, self.U), self.core.astype(x.dtype))
        # Converters may return an offset for zeros: where nothing is mixed, V is not read.
        update = jnp.where(
            jnp.any(self.core != 0), matmul(mixed, self.V), jnp.zeros((), x.dtype)
        )
        return _scaled(matmul(x, kernel) + update, self.scale)


def precomputed(adapters: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Return adapters by site without what every call of them would compute again: mixed modules, norms of columns."""

    def of_site(update: Any, kernel: Weight) -> Any:
        if isinstance(update, WeightDecomposed):
            layers = jnp.arange(kernel.shape[0])
            return jax.lax.map(
                lambda layer: layer[0].rescaled(at_layer(kernel, layer[1])),
                (update, layers),
            )
        if isinstance(update, Dense):
            return dataclasses.replace(update, apart=True)
        if not isinstance(update, Modules):
            return update
        # Added to weights in bfloat16, a small update would be rounded away; quantised factors are read faster.
        plain = model.config.dtype == "float32" and not isinstance(update.A, QArray)
        if update.delta is None or not plain:
            return update.low_rank()
        return Dense(update.delta, update.scale, apart=True)

    weights = kernels(model, adapters)
    return {site: of_site(update, weights[site]) for site, update in adapters.items()}


def _scaled(y: Array, scale: Array | None) -> Array:
    y = summed(y)
    if scale is None:
        return y
    exact = widened(
        y
    )  # XLA is slow at sums of bfloat16 on a CPU, here those of the gradient of the scale
    return (
        exact * jnp.expand_dims(scale.astype(exact.dtype), range(y.ndim - 1))
    ).astype(y.dtype)


def side_by_side(A: Weight, B: Weight) -> tuple[Weight, Weight]:
    """Return modules [L, N, d_in, r] and [L, N, r, d_out] as one of rank N r, which may be quantised."""
    A = jax.tree.map(
        lambda a: jnp.swapaxes(a, 1, 2).reshape(a.shape[0], a.shape[2], -1), A
    )
    return A, jax.tree.map(lambda b: b.reshape(b.shape[0], -1, b.shape[3]), B)


def gather(weight: Weight, index: Array) -> Weight:
    """Return the modules `index` [*N] of a weight [P, ...], which may be plain, quantised or programmed."""
    # `compose` checks the index: to fill in for others, a device would write all chosen modules again for every token.
    return jax.tree.map(lambda a: jnp.take(a, index, axis=0, mode="clip"), weight)
