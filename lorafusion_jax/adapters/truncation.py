"""The difference of an adapted and a base matrix at a low rank, from which a LoRA can start.

With the update L R and the scale s of the columns, the difference is

    without s   L R: from the QR decompositions of L and R^T and the SVD of the product of their triangles
    with s      D = W diag(s - 1) + L R diag(s): by a randomised SVD from products with D and D^T, never from D itself
                (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1)

NumPy computes one matrix after the other, because two factorisations in one compiled function can wait for each other
on a CPU (see `pool.rotated_pool`).

Axis letters: L layer, r rank, k rank of the whole update.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..models.weights import Weight, dense
from .updates import Dense, LowRank, Modules, Rescaled

# Columns of the sketch beyond the rank, and its iterations: the part that is left out is then within 1 % of the least.
_MORE = 16
_ITERATIONS = 4


class Truncated(NamedTuple):
    """Update of a site at a low rank.

    Attributes:
      A: left singular vectors times the roots of the singular values; columns without a singular value are zero.
      B: right ones.
      norms: ||W + L R|| of every column times its scale.
      left_out: share of the difference's squared norm that the rank leaves out.
    """

    A: Float[np.ndarray, "L d_in r"]
    B: Float[np.ndarray, "L r d_out"]
    norms: Float[np.ndarray, "L d_out"]
    left_out: float


class Factors(NamedTuple):
    """An update's factors by layer, both None if it only rescales columns, and its scale."""

    left: Float[Array, "L d_in k"] | None
    right: Float[Array, "L k d_out"] | None
    scale: Float[Array, "L d_out"] | None


def factors_of(adapters: Mapping[str, Any]) -> dict[str, Factors]:
    """Return the factors of updates by site, for `jax.jit`, which then forms no sums of modules that nothing needs."""

    def of_site(update: Any) -> Factors:
        if isinstance(update, Rescaled):
            return Factors(None, None, update.scale)
        if isinstance(
            update, Dense
        ):  # a sum whose factors are together larger than this matrix
            layers, _, d_out = update.delta.shape
            return Factors(
                update.delta,
                jnp.broadcast_to(jnp.eye(d_out), (layers, d_out, d_out)),
                update.scale,
            )
        if isinstance(update, Modules):
            update = update.low_rank()
        if not isinstance(update, LowRank):
            raise ValueError(
                f"an update of the kind {type(update).__name__} has no factors to start a LoRA from"
            )
        return Factors(
            dense(update.A, jnp.float32), dense(update.B, jnp.float32), update.scale
        )

    return {site: of_site(update) for site, update in adapters.items()}


def truncated(
    factors: Factors, kernel: Weight, rank: int, *, rescaled: bool = True
) -> Truncated:
    """Return the difference of the adapted and the base matrices of a site at a rank.

    With `rescaled` the scale is a part of the difference, otherwise only of the norms.

    Raises:
      ValueError: the update has numbers that are not finite.
    """
    layers, d_in, d_out = kernel.shape
    A = np.zeros((layers, d_in, rank), np.float32)
    B = np.zeros((layers, rank, d_out), np.float32)
    norms = np.zeros((layers, d_out), np.float32)
    total = 0.0
    truncated_power = 0.0
    for layer in range(layers):
        W = np.asarray(
            dense(jax.tree.map(lambda a, at=layer: a[at], kernel), jnp.float32)
        )
        L = np.zeros((d_in, 0), np.float32)
        R = np.zeros((0, d_out), np.float32)
        s = np.ones(d_out, np.float32)
        if factors.left is not None and factors.right is not None:
            L = np.asarray(factors.left[layer])
            R = np.asarray(factors.right[layer])
        if factors.scale is not None:
            s = np.asarray(factors.scale[layer])
        if not all(np.isfinite(a).all() for a in (L, R, s)):
            raise ValueError("the update has numbers that are not finite")
        between = np.sum((L.T @ W) * R, axis=0)
        squared_update = np.sum(((L.T @ L) @ R) * R, axis=0)
        squared = np.sum(np.square(W), axis=0)
        norms[layer] = s * np.sqrt(
            np.maximum(squared + 2 * between + squared_update, 0)
        )
        if factors.scale is None or not rescaled:
            U, S, Vt = _svd_of_product(L, R)
            total += float(np.sum(np.square(S)))
        else:
            U, S, Vt = _randomised_svd(W, L, R, s, rank)
            column_powers = (
                np.square(s - 1) * squared
                + 2 * s * (s - 1) * between
                + np.square(s) * squared_update
            )
            total += float(np.sum(column_powers))
        S = S[:rank] * (S[:rank] > np.finfo(np.float32).eps * max(d_in, d_out) * S[:1])
        truncated_power += float(np.sum(np.square(S)))
        A[layer, :, : len(S)] = U[:, : len(S)] * np.sqrt(S)
        B[layer, : len(S)] = np.sqrt(S)[:, None] * Vt[: len(S)]
    return Truncated(
        A, B, norms, max(1 - truncated_power / total, 0.0) if total else 0.0
    )


_Svd = tuple[np.ndarray, np.ndarray, np.ndarray]


def _svd_of_product(L: np.ndarray, R: np.ndarray) -> _Svd:
    left, first = np.linalg.qr(L)
    right, second = np.linalg.qr(R.T)
    U, S, Vt = np.linalg.svd(first @ second.T, full_matrices=False)
    return left @ U, S, Vt @ right.T


def _randomised_svd(
    W: np.ndarray, L: np.ndarray, R: np.ndarray, s: np.ndarray, rank: int
) -> _Svd:
    by = (s - 1)[:, None]
    scale = s[:, None]

    def times(x: np.ndarray) -> np.ndarray:
        return np.linalg.qr(W @ (by * x) + L @ (R @ (scale * x)))[0]

    def transposed_times(x: np.ndarray) -> np.ndarray:
        return by * (W.T @ x) + scale * (R.T @ (L.T @ x))

    columns = min(rank + _MORE, *W.shape)
    basis = times(
        np.random.default_rng(0).standard_normal((W.shape[1], columns), np.float32)
    )
    for _ in range(_ITERATIONS):
        basis = times(np.linalg.qr(transposed_times(basis))[0])
    U, S, Vt = np.linalg.svd(transposed_times(basis).T, full_matrices=False)
    return basis @ U, S, Vt
