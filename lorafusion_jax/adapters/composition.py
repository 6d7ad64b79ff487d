"""Fusion: coefficients mix the pool, magnitudes rescale the columns, and the result adapts a linear map.

One definition, with W [d_in, d_out] a base kernel, A_n, B_n the pool (scaling folded into B), c coefficients:

    mix:  dW = (sum_n c_n A_n) (sum_n c_n B_n)        LoraHub, and the paper's code
    sum:  dW = sum_n c_n A_n B_n                      linear in c
    y = x (W + dW), with magnitudes  y = m / ||W + dW|| * x (W + dW)   (norm over d_in, DoRA's rule)

`mix` is evaluated in the weights (`LowRank`), and `sum` as one product of rank N r (`Modules`) or as a matrix
(`Dense`): where N r reaches d_in, and on a CPU for many tokens, if the norms need that matrix anyway. Modules in arrays
are evaluated in the outputs (`Outputs`), and a sum in a shared basis is one update of rank k. Norms are digital: those
of the quantised or programmed weights, unless `Gram.modules` holds the modules to use.

Axis letters: L layer, N adapters of a fusion, P adapters of the pool, r rank, k directions of a basis.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ..models.weights import dense, is_in_arrays
from ..support.platform import for_cpu, is_traced
from .basis import SharedBasis
from .norms import (
    Gram,
    PairTerms,
    column_norm,
    norm_of_sum,
    product,
    product_is_smaller,
    squared_columns,
)
from .pool import LoraPool, in_pool
from .updates import Composition, Dense, InBasis, LowRank, Modules, Outputs, gather

_NORM = "norm"  # its name in the checkpoint policy


def check_mix(pool: LoraPool, index: Int[Array, " N"] | None = None) -> None:
    """Raise ValueError if `mix` would add matrices of different ranks, which neither PEFT nor LoraHub defines.

    Inside a compiled function nothing is checked if ranks have no values, and all modules if `index` has none.
    """
    if is_traced(pool.rank):
        return
    chosen = (
        np.arange(len(pool)) if index is None or is_traced(index) else np.asarray(index)
    )
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
    gram: Gram | PairTerms | None = None,
    magnitudes: dict[str, Float[Array, "_L _d_out"]] | None = None,
    differentiate_norm: bool = False,
) -> tuple[dict[str, LowRank | Dense | Modules | Outputs], Int[Array, ""]]:
    """Return a fusion's adapters by site, and the number of floored column norms.

    Modules in arrays are mixed in their outputs, all others in the weights.

    Args:
      pool: P adapters.
      index: positions of the N adapters that this fusion mixes. Inside a compiled function, one outside of the pool
        makes the adapters NaN.
      coefficients: site -> per layer and module, k = 1, or per rank too, k = r (see `coefficients.expand`).
      composition: `mix` or `sum`.
      gram: needed with magnitudes; pair terms only of a sum with k = 1 that is not in arrays.
      magnitudes: m per site, in a DoRA pool its `magnitude`; None leaves the columns as they are.
      differentiate_norm: let gradients flow through ||W + dW||; PEFT's DoRA rule treats it as constant.

    Raises:
      ValueError: as `check_mix` does; magnitudes without Gram terms; pair terms of another fusion; an index outside of
        the pool.
    """
    _check_gram("pool", gram, magnitudes)
    factor = in_pool(len(pool), index)
    if composition == "mix":
        check_mix(pool, index)
    in_arrays = is_in_arrays((pool.A, pool.B))
    shared_coefficients = (
        composition == "sum"
        and not in_arrays
        and all(c.shape[2] == 1 for c in coefficients.values())
    )
    if (
        magnitudes is not None
        and isinstance(gram, PairTerms)
        and not shared_coefficients
    ):
        raise ValueError(
            "pair terms give the norms of a sum of digital modules with one coefficient each: precompute the frozen "
            "weights with the fusion that is trained, or use gram(pool, kernels)"
        )

    def of_layer(
        layer: tuple,
    ) -> tuple[LowRank | Dense | Array | None, Array | None, Array]:
        A, B, c, squared, cross, m = layer
        delta = None
        if m is None and in_arrays:
            return None, None, jnp.int32(0)
        if composition == "mix":
            places = index
            # Gathering copies the chosen modules, which takes less time than reading a pool of three times as many.
            if for_cpu() and len(pool) >= 3 * len(index):
                # In the pool's order, sums have the bits that they have without the other modules.
                chosen = jnp.sort(index)
                places = jnp.searchsorted(chosen, index)
                A = gather(A, chosen)
                B = gather(B, chosen)
                if m is not None:
                    cross = jnp.take(cross, chosen, axis=0)
            A = dense(A, jnp.float32)
            B = dense(B, jnp.float32)
            # Weights scattered over modules read them in place.
            spread = (
                jnp.zeros((A.shape[0], c.shape[1]), c.dtype)
                .at[places]
                .set(c, mode="clip")
            )
            left = _weighted(A, spread[:, None, :])
            right = _weighted(B, spread[:, :, None])
            update = LowRank(left, right)
            if m is not None:
                cross = _weighted(cross, spread[:, :, None])
        else:
            left = dense(gather(A, index), jnp.float32)
            left = left.transpose(1, 0, 2).reshape(left.shape[1], -1)
            right = _merged(dense(gather(B, index), jnp.float32) * c[:, :, None])
            d_in, k = left.shape
            d_out = right.shape[1]
            needed = m is not None and for_cpu() and product_is_smaller(d_in, k, d_out)
            delta = product(left, right) if k >= d_in or needed else None
            # The N r columns of A reach the width of x, so that the sum is not of low rank.
            update = Dense(delta) if delta is not None and k >= d_in else delta
            if m is not None:
                cross = _merged(jnp.take(cross, index, axis=0))
        if m is None:
            return update, None, jnp.int32(0)
        if delta is None:
            squared_update = squared_columns(left, right)
        else:
            squared_update = jnp.sum(jnp.square(delta), axis=0)
        norm, floored = column_norm(
            squared, 2 * jnp.sum(cross * right, axis=0), squared_update
        )
        return (
            None if in_arrays else update,
            _scale(m, norm, differentiate_norm),
            floored,
        )

    adapters = {}
    total = jnp.int32(0)
    for site, c in coefficients.items():
        c = c * factor
        terms = (None, None, None)
        pair_scale = None
        if magnitudes is not None and isinstance(gram, PairTerms):
            norm, floored = norm_of_sum(
                gram.squared[site],
                gram.cross[site],
                gram.pairs[site],
                index,
                c[:, :, 0],
            )
            pair_scale = _scale(magnitudes[site], norm, differentiate_norm)
            total = total + floored
        elif magnitudes is not None:
            assert gram is not None
            terms = (gram.squared[site], gram.cross[site], magnitudes[site])
        A = pool.A[site]
        B = pool.B[site]
        if in_arrays:
            # Ranks that a module lacks have no cells: padding must not add cell noise.
            real = (
                jnp.arange(A.shape[-1])[None, None, :]
                < pool.rank[site][:, index][:, :, None]
            )
            c = c * real.astype(c.dtype)
        if isinstance(gram, Gram) and gram.modules is not None:
            modules = gram.modules
        else:
            modules = pool
        assert isinstance(modules, LoraPool)
        layers = (modules.A[site], modules.B[site], c, *terms)
        # checkpoint: the backward pass dequantises modules again instead of keeping them; norms are kept.
        layer_updates = jax.checkpoint(
            of_layer, policy=jax.checkpoint_policies.save_only_these_names(_NORM)
        )
        if (
            composition == "mix"
            and for_cpu()
            and all(isinstance(leaf, jax.Array) for leaf in layers[:2])
        ):
            # A loop would copy the pool, forward and backward.
            update, scale, floored = jax.jit(jax.vmap(layer_updates))(layers)
        else:
            update, scale, floored = jax.lax.map(layer_updates, layers, batch_size=4)
        scale = scale if pair_scale is None else pair_scale
        total = total + jnp.sum(floored, dtype=jnp.int32)
        per_layer = jnp.broadcast_to(index[None], (c.shape[0], *index.shape))
        if isinstance(update, LowRank | Dense):
            adapters[site] = dataclasses.replace(update, scale=scale)
        elif in_arrays:
            adapters[site] = Outputs(A, B, per_layer, c, composition, scale)
        else:
            adapters[site] = Modules(A, B, per_layer, c, scale, update)
    return adapters, total


def compose_in_basis(
    basis: SharedBasis,
    index: Int[Array, " N"],
    coefficients: dict[str, Float[Array, "_L N #1"]],
    *,
    gram: Gram | None = None,
    magnitudes: dict[str, Float[Array, "_L _d_out"]] | None = None,
    differentiate_norm: bool = False,
) -> tuple[dict[str, LowRank | InBasis], Int[Array, ""]]:
    """Return the adapters by site of a sum in a shared basis, and the number of floored column norms.

    Other arguments and errors are those of `compose`.
    """
    _check_gram("basis", gram, magnitudes)
    in_arrays = is_in_arrays((basis.U, basis.V))
    exact_basis = basis if gram is None or gram.modules is None else gram.modules
    assert isinstance(exact_basis, SharedBasis)
    factor = in_pool(len(basis), index)
    adapters = {}
    total = jnp.int32(0)
    for site, c in coefficients.items():
        S = jnp.take(basis.S[site], index, axis=1, mode="clip")
        mixed = jnp.einsum("ln,lnij->lij", c[:, :, 0] * factor, S, precision="highest")
        U = basis.U[site]
        V = basis.V[site]
        right = product(mixed, dense(exact_basis.V[site], jnp.float32))
        scale = None
        if magnitudes is not None:
            assert gram is not None
            left = dense(exact_basis.U[site], jnp.float32)
            between = 2 * jnp.sum(gram.cross[site] * right, axis=1)
            squared_update = jax.vmap(squared_columns)(left, right)
            norm, floored = column_norm(gram.squared[site], between, squared_update)
            scale = _scale(magnitudes[site], norm, differentiate_norm)
            total = total + floored
        if in_arrays:
            adapters[site] = InBasis(U, V, mixed, scale)
        else:
            adapters[site] = LowRank(dense(U, jnp.float32), right, scale)
    return adapters, total


def _check_gram(
    pool: str, gram: Gram | PairTerms | None, magnitudes: dict[str, Array] | None
) -> None:
    if magnitudes is not None and gram is None:
        raise ValueError(
            f"magnitudes need the Gram terms of the norms to divide by: give gram({pool}, kernels)"
        )


def _scale(magnitudes: Array, norm: Array, differentiate_norm: bool) -> Array:
    if not differentiate_norm:
        norm = checkpoint_name(jax.lax.stop_gradient(norm), _NORM)
    return magnitudes / norm


def _weighted(
    modules: Float[Array, "P a b"], weights: Float[Array, "P #a #b"]
) -> Float[Array, "a b"]:
    if weights.size == modules.shape[0]:
        return _weighted_whole(modules, weights.reshape(-1))
    return jnp.sum(modules * weights, axis=0)


@jax.custom_vjp
def _weighted_whole(
    modules: Float[Array, "P a b"], weights: Float[Array, " P"]
) -> Float[Array, "a b"]:
    """Return sum_n weights_n modules_n.

    On a CPU its last bits, and its gradient's, do not depend on modules of weight zero. This matters because the other
    seeds of a run decide which modules are in memory.
    """
    # Reshaped, columns that a mesh splits would be gathered.
    return jnp.tensordot(weights, modules, axes=1, precision="highest")


def _weighted_backward(factors: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    modules, weights = factors
    # One sum for each module: the order of summation in a matrix-vector product depends on the number of rows.
    return weights[:, None, None] * g[None], jnp.sum(modules * g[None], axis=(1, 2))


_weighted_whole.defvjp(
    lambda *factors: (_weighted_whole(*factors), factors), _weighted_backward
)


def _merged(modules: Float[Array, "N r d_out"]) -> Float[Array, "k d_out"]:
    return modules.reshape(-1, modules.shape[-1])
