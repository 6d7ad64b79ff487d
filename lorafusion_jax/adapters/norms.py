"""Column norms of W and of W + dW, computed without forming W + dW.

Products of weights with weights use precision "highest". By default a TPU would multiply float32 numbers in bfloat16,
and a recent NVIDIA card in TF32. On a CPU the setting changes nothing.

Axis letters: L layer, N adapters of a fusion, P adapters of the pool, Q pairs of them, r rank, k directions of a basis.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..models.weights import Weight, dense
from .basis import Pool, SharedBasis
from .pool import LoraPool

# Where dW nearly cancels W, the Gram form loses digits and can become negative, so it is floored at a few eps.
_NORM_FLOOR = 8 * float(jnp.finfo(jnp.float32).eps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gram:
    """Terms of the norm ||W + dW|| other than the pool itself, computed once per base and pool.

    Attributes:
      squared: site -> [L, d_out], ||W||^2 of every column.
      cross: site -> [L, P, r, d_out], A_n^T W; of a shared basis [L, k, d_out], U^T W.
      modules: the pool whose factors enter the norms, or None for the fusion's own. For a pool in arrays it holds the
        target values instead of the programmed ones.
    """

    squared: dict[str, Float[Array, "*C _L _d_out"]]
    cross: dict[str, Float[Array, "..."]]
    modules: Pool | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairTerms:
    """All terms of the norm of W + sum_n c_n dW_n, computed once per base and pool: only c is left to a step.

    Attributes:
      squared: site -> [L, d_out], ||W||^2 of every column.
      cross: site -> [L, P, d_out], W . dW_n of every column.
      pairs: site -> [L, Q, d_out], dW_n . dW_m of every column, n <= m, in the order of `np.triu_indices(P)`.
    """

    squared: dict[str, Float[Array, "*C _L _d_out"]]
    cross: dict[str, Float[Array, "*C _L P _d_out"]]
    pairs: dict[str, Float[Array, "*C _L Q _d_out"]]


def pairs_are_smaller(modules: int, rank: int) -> bool:
    """Return whether `PairTerms` take no more memory than `Gram`: P (P + 1) / 2 + P numbers a column, or P r."""
    return modules + 3 <= 2 * rank


def gram(pool: Pool, kernels: dict[str, Weight]) -> Gram:
    """Return the Gram terms of a pool on the kernels of its sites, in float32, one layer at a time.

    Each module has a separate product: in a single product, a module's last bits depend on the number of modules.
    """

    def of_layer(layer: tuple[Weight, Weight]) -> tuple[Array, Array]:
        kernel = dense(layer[0], jnp.float32)
        A = dense(layer[1], jnp.float32)
        if A.ndim == 2:
            cross = product(A.T, kernel)
        else:
            cross = jax.lax.map(lambda a: product(a.T, kernel), A)
        return jnp.sum(jnp.square(kernel), axis=0), cross

    factors = pool.U if isinstance(pool, SharedBasis) else pool.A
    terms = {
        site: jax.lax.map(of_layer, (kernels[site], A)) for site, A in factors.items()
    }
    return Gram(
        {site: t[0] for site, t in terms.items()},
        {site: t[1] for site, t in terms.items()},
    )


def pair_terms(pool: LoraPool, kernels: dict[str, Weight]) -> PairTerms:
    """Return the pair terms of a pool on the kernels of its sites, in float32, one layer and one pair at a time."""

    def of_layer(layer: tuple[Weight, Weight, Weight]) -> tuple[Array, Array, Array]:
        kernel = dense(layer[0], jnp.float32)
        A = dense(layer[1], jnp.float32)
        B = dense(layer[2], jnp.float32)

        def of_module(n: Array) -> Array:
            return jnp.sum(product(A[n].T, kernel) * B[n], axis=0)

        def of_pair(pair: tuple[Array, Array]) -> Array:
            n, m = pair
            return jnp.sum(B[n] * product(product(A[n].T, A[m]), B[m]), axis=0)

        cross = jax.lax.map(of_module, jnp.arange(len(pool)))
        return (
            jnp.sum(jnp.square(kernel), axis=0),
            cross,
            jax.lax.map(of_pair, np.triu_indices(len(pool))),
        )

    terms = {
        site: jax.lax.map(of_layer, (kernels[site], A, pool.B[site]))
        for site, A in pool.A.items()
    }
    return PairTerms(
        *({site: site_terms[i] for site, site_terms in terms.items()} for i in range(3))
    )


def norms(kernels: dict[str, Weight]) -> dict[str, Float[Array, "_L _d_out"]]:
    """Return ||W|| of every column of the kernels, in float32."""

    def of_layer(kernel: Weight) -> Array:
        return jnp.linalg.norm(dense(kernel, jnp.float32), axis=0)

    return {site: jax.lax.map(of_layer, kernel) for site, kernel in kernels.items()}


def column_norms(gram: Gram | PairTerms) -> dict[str, Float[Array, "_L _d_out"]]:
    """Return ||W|| of every column, the initial magnitudes."""
    return {site: jnp.sqrt(squared) for site, squared in gram.squared.items()}


def product(a: Float[Array, "*M k"], b: Float[Array, "*N k n"]) -> Float[Array, "..."]:
    """Return `a @ b` of float32 weights in float32, whatever a device's default is."""
    return jnp.matmul(a, b, precision="highest")


def column_norm(
    squared: Float[Array, "*L d_out"],
    between: Float[Array, "*L d_out"],
    squared_update: Float[Array, "*L d_out"],
) -> tuple[Float[Array, "*L d_out"], Int[Array, ""]]:
    """Return ||W + dW|| per column from its Gram terms, and the number of floored ones.

    ||w + dw||^2 = ||w||^2 + 2 w . dw + ||dw||^2. With dW = A B the second term is 2 (A^T W)_j . B_j and the third is
    B_j . (A^T A) B_j, so that neither W nor dW is formed.
    """
    floor = _NORM_FLOOR * (squared + squared_update)
    total = squared + between + squared_update
    return jnp.sqrt(jnp.maximum(total, floor)), jnp.sum(total < floor, dtype=jnp.int32)


def norm_of_sum(
    squared: Float[Array, "L d_out"],
    cross: Float[Array, "L P d_out"],
    pairs: Float[Array, "L Q d_out"],
    index: Int[Array, " N"],
    coefficients: Float[Array, "L N"],
) -> tuple[Float[Array, "L d_out"], Int[Array, ""]]:
    """Return ||W + sum_n c_n dW_n|| per column from its `PairTerms`, and the number of floored ones.

    ||w + sum_n c_n d_n||^2 = ||w||^2 + 2 sum_n c_n w . d_n + sum_{n <= m} (2 - [n = m]) c_n c_m d_n . d_m.
    """
    modules = cross.shape[1]
    c = (
        jnp.zeros((len(squared), modules), coefficients.dtype)
        .at[:, index]
        .add(coefficients)
    )
    first, second = np.triu_indices(modules)
    pair_weights = (
        jnp.where(first == second, 1.0, 2.0)[None] * c[:, first] * c[:, second]
    )
    weighted = partial(jnp.einsum, "ln,lno->lo", precision="highest")
    return column_norm(squared, 2 * weighted(c, cross), weighted(pair_weights, pairs))


def product_is_smaller(d_in: int, k: int, d_out: int) -> bool:
    """Return whether a product of rank k has fewer numbers than its factors, which decides how norms are computed."""
    return d_in * d_out < k * (d_in + d_out)


def squared_columns(
    left: Float[Array, "d_in k"], right: Float[Array, "k d_out"]
) -> Float[Array, " d_out"]:
    """Return ||left right||^2 of every column, by the order of products that takes fewer operations."""
    d_in, k = left.shape
    d_out = right.shape[1]
    if product_is_smaller(d_in, k, d_out):
        return jnp.sum(jnp.square(product(left, right)), axis=0)
    return jnp.sum(right * product(product(left.T, left), right), axis=0)
