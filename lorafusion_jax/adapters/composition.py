"""Fusion: coefficients mix the pool, magnitudes rescale the columns, and the result adapts a linear map.

One definition, with W [d_in, d_out] a base kernel, A_n, B_n the pool (scaling folded into B), c coefficients:

    mix:  dW = (sum_n c_n A_n) (sum_n c_n B_n)        LoraHub, and the paper's code
    sum:  dW = sum_n c_n A_n B_n                      linear in c
    y = x (W + dW), with magnitudes  y = m / ||W + dW|| * x (W + dW)   (norm over d_in, DoRA's rule)

and several orders of evaluation, equal in exact arithmetic: `mix` in the weights (`Lora`), `sum` as one
product of rank N r (`Modules`) or, where N r reaches d_in, as a matrix (`Dense`), and both in the outputs,
module by module (`Outputs`), which is what hardware does whose A_n and B_n each sit in arrays of their own. Norms
are digital, and those of the weights as they are: quantised, or as programmed unless `Gram.modules` says otherwise.

Products of weights with weights (norms, Gram terms, mixes) have precision "highest": by default a TPU multiplies
float32 numbers in bfloat16 and a recent NVIDIA card in TF32. A CPU computes the same either way.

Axis letters: L layer, N adapters of a fusion, P adapters of the pool, r rank.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ..crossbar.values import is_traced
from ..models.weights import Weight, dense, is_in_arrays, map_layers, matmul
from .pool import LoraPool

Composition = Literal["mix", "sum"]

_NORM = "norm"  # as the checkpoint policy calls it
# Where dW nearly cancels W the Gram form loses digits and can turn negative: floored at a few eps.
_NORM_FLOOR = 8 * float(jnp.finfo(jnp.float32).eps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
    """One low-rank update: `(x W + x A B) * scale`.

    Attributes:
      A: [d_in, r], under a scan over layers [L, d_in, r].
      B: [r, d_out].
      scale: [d_out], or None for 1.
    """

    A: Weight
    B: Weight
    scale: Array | None = None

    def __call__(self, x: Float[Array, "*B d_in"], kernel: Weight) -> Float[Array, "*B d_out"]:
        """Return the adapted product."""
        return _scaled(matmul(x, kernel) + matmul(matmul(x, self.A), self.B), self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """One update as a whole matrix: `x (W + dW) * scale`.

    Used only where N r >= d_in: the modules' factors are then no smaller than dW, which is formed for all layers.

    Attributes:
      delta: [d_in, d_out].
      scale: [d_out], or None for 1.
    """

    delta: Float[Array, "*L d_in d_out"]
    scale: Array | None = None

    def __call__(self, x: Float[Array, "*B d_in"], kernel: Weight) -> Float[Array, "*B d_out"]:
        """Return the adapted product."""
        if is_in_arrays(kernel):
            return _scaled(matmul(x, kernel) + matmul(x, self.delta), self.scale)
        return _scaled(matmul(x, dense(kernel, jnp.float32) + self.delta), self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Modules:
    """A sum of products, as one update of rank N r: `(x W + sum_n c_n x A_n B_n) * scale`.

    The modules are gathered from the pool where they are used, layer by layer inside the scan, so that
    seeds with different draws share one pool in memory.

    Attributes:
      A: [P, d_in, r].
      B: [P, r, d_out].
      index: [N], which modules.
      coefficients: [N, 1], or [N, r] to weigh every rank on its own.
      scale: [d_out], or None for 1.
    """

    A: Weight
    B: Weight
    index: Int[Array, "*L N"]
    coefficients: Float[Array, "*L N k"]
    scale: Array | None = None

    def __call__(self, x: Float[Array, "*B d_in"], kernel: Weight) -> Float[Array, "*B d_out"]:
        """Return the adapted product."""
        A, B = (dense(_gather(w, self.index), x.dtype) for w in (self.A, self.B))
        reads = jnp.einsum("...i,nir->...nr", x, A)
        mixed = reads * jnp.expand_dims(self.coefficients.astype(x.dtype), range(x.ndim - 1))
        return _scaled(matmul(x, kernel) + jnp.einsum("...nr,nro->...o", mixed, B), self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """Modules in arrays of their own, mixed in their outputs: every A_n and B_n is read as it stands.

    Attributes:
      A: [P, d_in, r].
      B: [P, r, d_out].
      index: [N], which modules.
      coefficients: [N, r], zero where a module has no such rank.
      composition: `mix` or `sum`.
      scale: [d_out], or None for 1.
    """

    A: Weight
    B: Weight
    index: Int[Array, "*L N"]
    coefficients: Float[Array, "*L N r"]
    composition: Composition = dataclasses.field(metadata={"static": True})
    scale: Array | None = None

    def __call__(self, x: Float[Array, "*B d_in"], kernel: Weight) -> Float[Array, "*B d_out"]:
        """Return the adapted product."""
        A, B = (_gather(w, self.index) for w in (self.A, self.B))
        return _scaled(mix_outputs(x, kernel, A, B, self.coefficients, self.composition), self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gram:
    """What the norm ||W + dW|| needs besides the pool, computed once per base and pool.

    Attributes:
      squared: site -> [L, d_out], ||W||^2 of every column.
      cross: site -> [L, P, r, d_out], A_n^T W.
      modules: whose A and B the norms are of, where the pool's own are not: it sits in arrays, and the norms are of
        what was meant to be there.
    """

    squared: dict[str, Float[Array, "*C _L _d_out"]]
    cross: dict[str, Float[Array, "*C _L P _r _d_out"]]
    modules: LoraPool | None = None


def gram(pool: LoraPool, kernels: dict[str, Weight]) -> Gram:
    """Return the Gram terms of a pool on the kernels of its sites, in float32, one layer at a time.

    Each module has a product of its own: in one for all, its last bits depend on how many there are.
    """

    def of_layer(layer: tuple[Weight, Weight]) -> tuple[Array, Array]:
        kernel, A = (dense(w, jnp.float32) for w in layer)
        return jnp.sum(jnp.square(kernel), axis=0), jax.lax.map(lambda a: product(a.T, kernel), A)

    terms = {site: map_layers(of_layer, (kernels[site], A)) for site, A in pool.A.items()}
    return Gram({site: t[0] for site, t in terms.items()}, {site: t[1] for site, t in terms.items()})


def norms(kernels: dict[str, Weight]) -> dict[str, Float[Array, "_L _d_out"]]:
    """Return ||W|| of every column of kernels, in float32."""

    def of_layer(kernel: Weight) -> Array:
        return jnp.linalg.norm(dense(kernel, jnp.float32), axis=0)

    return {site: map_layers(of_layer, kernel) for site, kernel in kernels.items()}


def column_norms(gram: Gram) -> dict[str, Float[Array, "_L _d_out"]]:
    """Return ||W|| of every column, where magnitudes start."""
    return {site: jnp.sqrt(squared) for site, squared in gram.squared.items()}


def product(a: Float[Array, "*M k"], b: Float[Array, "*N k n"]) -> Float[Array, "..."]:
    """Return `a @ b` of float32 weights in float32, whatever a device's default is."""
    return jnp.matmul(a, b, precision="highest")


def check_mix(pool: LoraPool, index: Int[Array, " N"] | None = None) -> None:
    """Raise ValueError where `mix` would add matrices of different ranks: neither PEFT nor LoraHub defines that.

    Inside a compiled program ranks have no values; nothing is refused there.

    Args:
      pool: P adapters.
      index: which of them are mixed; all if it is None, or has no values yet.
    """
    if is_traced(pool.rank):
        return
    chosen = np.arange(len(pool)) if index is None or is_traced(index) else np.asarray(index)
    for site, rank in pool.rank.items():
        ranks = np.asarray(rank)[..., chosen]
        if np.any((ranks > 0) & (ranks != ranks.max(axis=-1, keepdims=True))):
            raise ValueError(
                f"the pool's adapters have different ranks at {site}, and mix adds their matrices entry by entry: "
                "use the composition sum, or a pool of one rank"
            )


def compose(
    pool: LoraPool,
    index: Int[Array, " N"],
    coefficients: dict[str, Float[Array, "_L N _k"]],
    composition: Composition,
    *,
    gram: Gram | None = None,
    magnitudes: dict[str, Float[Array, "_L _d_out"]] | None = None,
    differentiate_norm: bool = False,
) -> tuple[dict[str, Lora | Dense | Modules | Outputs], Int[Array, ""]]:
    """Return the adapters that a fusion puts on the model, and how many column norms were floored.

    Modules that sit in arrays are mixed in their outputs, all others in the weights.

    Args:
      pool: P adapters.
      index: the N of them that this fusion mixes.
      coefficients: site -> per layer and module, k = 1, or per rank too, k = r (see `coefficients.expand`).
      composition: `mix` or `sum`.
      gram: needed with magnitudes.
      magnitudes: m per site, in a DoRA pool its `magnitude`; None leaves the columns as they are.
      differentiate_norm: let gradients flow through ||W + dW||; PEFT's DoRA rule treats it as constant.

    Raises:
      ValueError: as `check_mix` does.
    """
    if composition == "mix":
        check_mix(pool, index)
    in_arrays = is_in_arrays((pool.A, pool.B))

    def of_layer(layer: tuple) -> tuple[Lora | Dense | None, Array | None, Array]:
        A, B, c, squared, cross, m = layer
        if m is None and in_arrays:
            return None, None, jnp.int32(0)
        if composition == "mix":
            update = _mixed(A, B, index, c)
            left, right = dense(update.A, jnp.float32), dense(update.B, jnp.float32)
            if m is not None:
                cross = _weighted(cross, _scatter(c, index, cross.shape[0])[:, :, None])
        else:
            left = dense(_gather(A, index), jnp.float32)
            left = left.transpose(1, 0, 2).reshape(left.shape[1], -1)
            right = _merged(dense(_gather(B, index), jnp.float32) * c[:, :, None])
            # N r columns of A reach the width of x: the sum has no low rank to make use of.
            update = Dense(product(left, right)) if left.shape[1] >= left.shape[0] else None
            if m is not None:
                cross = _merged(jnp.take(cross, index, axis=0))
        if m is None:
            return update, None, jnp.int32(0)
        if isinstance(update, Dense):
            of_update = jnp.sum(jnp.square(update.delta), axis=0)
        else:
            of_update = _squared_columns(left, right)
        norm, floored = column_norm(squared, 2 * jnp.sum(cross * right, axis=0), of_update)
        if not differentiate_norm:
            norm = checkpoint_name(jax.lax.stop_gradient(norm), _NORM)
        return None if in_arrays else update, m / norm, floored

    adapters, total = {}, jnp.int32(0)
    for site, c in coefficients.items():
        terms = (None, None, None)
        if magnitudes is not None and gram is not None:
            terms = (gram.squared[site], gram.cross[site], magnitudes[site])
        A, B = pool.A[site], pool.B[site]
        if in_arrays:
            # What a module lacks has no cells: padding must not bring in their noise.
            real = jnp.arange(A.shape[-1])[None, None, :] < pool.rank[site][:, index][:, :, None]
            c = jnp.where(real, c, jnp.zeros_like(c))
        of = pool if gram is None or gram.modules is None else gram.modules
        layers = (of.A[site], of.B[site], c, *terms)
        # checkpoint: dequantised modules are made again in the backward pass, not kept for all layers; norms are kept.
        of_layers = jax.checkpoint(of_layer, policy=jax.checkpoint_policies.save_only_these_names(_NORM))
        update, scale, floored = map_layers(of_layers, layers, batch_size=4)
        total = total + jnp.sum(floored, dtype=jnp.int32)
        if update is not None:
            adapters[site] = dataclasses.replace(update, scale=scale)
        else:
            per_layer = jnp.broadcast_to(index[None], (c.shape[0], *index.shape))
            if in_arrays:
                adapters[site] = Outputs(A, B, per_layer, c, composition, scale)
            else:
                adapters[site] = Modules(A, B, per_layer, c, scale)
    return adapters, total


def mix_outputs(
    x: Float[Array, "*B d_in"],
    kernel: Weight,
    A: Weight,
    B: Weight,
    coefficients: Float[Array, "N k"],
    composition: Composition,
) -> Float[Array, "*B d_out"]:
    """Return `x (W + dW)` mixed in the outputs: every A_n and B_n multiplied as it stands, then summed.

    The order of evaluation of hardware, whose modules sit frozen in arrays of their own.

    Args:
      x: activations.
      kernel: [d_in, d_out].
      A: [N, d_in, r].
      B: [N, r, d_out].
      coefficients: of each module (k = 1), or of each module and rank (k = r).
      composition: `mix` or `sum`.
    """
    c = jnp.expand_dims(coefficients.astype(x.dtype), range(1, x.ndim))
    reads = jax.vmap(matmul, in_axes=(None, 0))(x, A) * c
    if composition == "mix":
        reads = jnp.sum(reads, axis=0)[None] * c
    return matmul(x, kernel) + jnp.sum(jax.vmap(matmul)(reads, B), axis=0)


def _mixed(A: Weight, B: Weight, index: Int[Array, " N"], c: Float[Array, "N k"]) -> Lora:
    """Return the module whose A and B are the weighted sums of the chosen modules' A and B."""
    A, B = dense(A, jnp.float32), dense(B, jnp.float32)
    # Weights scattered over the whole pool read it where it lies; gathering would copy the chosen modules.
    c = _scatter(c, index, A.shape[0])
    return Lora(_weighted(A, c[:, None, :]), _weighted(B, c[:, :, None]))


def _scatter(c: Float[Array, "N k"], index: Int[Array, " N"], size: int) -> Float[Array, "P k"]:
    return jnp.zeros((size, c.shape[1]), c.dtype).at[index].set(c)


def _weighted(modules: Float[Array, "P a b"], weights: Float[Array, "P #a #b"]) -> Float[Array, "a b"]:
    """Return the weighted sum of modules; one vector-matrix product where one weight serves a module."""
    if weights.size == modules.shape[0]:
        return _weighted_whole(modules, weights.reshape(-1))
    return jnp.sum(modules * weights, axis=0)


@jax.custom_vjp
def _weighted_whole(modules: Float[Array, "P a b"], weights: Float[Array, " P"]) -> Float[Array, "a b"]:
    """Return sum_n weights_n modules_n.

    On a CPU its last bits, and its gradient's, do not depend on modules of weight zero: which ones lie in memory
    depends on the other seeds of a run.
    """
    return product(weights, modules.reshape(modules.shape[0], -1)).reshape(modules.shape[1:])


def _weighted_forward(modules: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return _weighted_whole(modules, weights), (modules, weights)


def _weighted_backward(factors: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    modules, weights = factors
    # A sum for each module: a matrix-vector product adds up in another order when there are more rows.
    return weights[:, None, None] * g[None], jnp.sum(modules * g[None], axis=(1, 2))


_weighted_whole.defvjp(_weighted_forward, _weighted_backward)


def _merged(modules: Float[Array, "N r d_out"]) -> Float[Array, "k d_out"]:
    return modules.reshape(-1, modules.shape[-1])


def column_norm(
    squared: Float[Array, " d_out"], between: Float[Array, " d_out"], of_update: Float[Array, " d_out"]
) -> tuple[Float[Array, " d_out"], Int[Array, ""]]:
    """Return ||W + dW|| per column from its Gram terms, and how many were floored.

    ||w + dw||^2 = ||w||^2 + 2 w . dw + ||dw||^2. With dW = A B the second is 2 (A^T W)_j . B_j and the third
    B_j . (A^T A) B_j, so that neither W nor dW is formed.
    """
    floor = _NORM_FLOOR * (squared + of_update)
    total = squared + between + of_update
    return jnp.sqrt(jnp.maximum(total, floor)), jnp.sum(total < floor, dtype=jnp.int32)


def _squared_columns(left: Float[Array, "d_in k"], right: Float[Array, "k d_out"]) -> Float[Array, " d_out"]:
    """Return ||left right||^2 of every column, by the order of products that takes fewer operations."""
    (d_in, k), d_out = left.shape, right.shape[1]
    if d_in * d_out < k * (d_in + d_out):
        return jnp.sum(jnp.square(product(left, right)), axis=0)
    return jnp.sum(right * product(product(left.T, left), right), axis=0)


def _scaled(y: Array, scale: Array | None) -> Array:
    return y if scale is None else y * jnp.expand_dims(scale.astype(y.dtype), range(y.ndim - 1))


def _gather(weight: Weight, index: Array) -> Weight:
    return jax.tree.map(lambda a: jnp.take(a, index, axis=0), weight)
