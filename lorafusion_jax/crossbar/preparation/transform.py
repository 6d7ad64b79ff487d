"""Orthogonal transforms that spread the weights of a column, and large input channels, over all rows.

A transform of width n is a Kronecker product of small orthogonal matrices. All entries of a Hadamard matrix have one
size, 1 / sqrt(n), so that every input channel reaches all rows alike. They are known for 1, 2, q + 1 and 2 q + 2 with q
a prime of the right remainder (Paley, 1933), and for products of these. Another width gets the cosine transform of its
odd factor instead, whose entries differ in size.
"""

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_MERGED = 64  # width up to which small matrices are multiplied into one
_WIDEST = 512  # of a matrix: each one is dense


@functools.lru_cache
def transform_matrices(width: int) -> tuple[Float[np.ndarray, "_f _f"], ...]:
    """Return the orthogonal matrices whose Kronecker product is the transform of a width.

    Raises:
      ValueError: the width has a large odd factor and no Hadamard matrix that is known here.
    """
    odd, orders = _factors(width)
    if odd > _WIDEST:
        raise ValueError(
            f"a transform of {width} inputs needs a dense matrix of width {odd}, more than {_WIDEST}: set "
            "mapping.transform to none, or keep these weights digital"
        )
    small = [_hadamard(order) / math.sqrt(order) for order in orders]
    if odd > 1:
        small.insert(0, _cosine(odd))
    merged: list[np.ndarray] = small[:1] or [np.ones((1, 1))]
    for matrix in small[1:]:
        if len(merged[-1]) * len(matrix) <= _MERGED:
            merged[-1] = np.kron(merged[-1], matrix)
        else:
            merged.append(matrix)
    return tuple(merged)


def transform(
    x: Float[Array, "*B n"],
    matrices: Sequence[Float[np.ndarray, "_f _f"]],
    *,
    inverse: bool = False,
) -> Float[Array, "*B n"]:
    """Return x H^T, or x H with `inverse`, for H the Kronecker product of the matrices."""
    lead = x.ndim - 1
    split = x.reshape(*x.shape[:-1], *map(len, matrices))
    for place, matrix in enumerate(matrices):
        factor = jnp.asarray(matrix.T if inverse else matrix, x.dtype)
        product = jnp.tensordot(
            split, factor, axes=([lead + place], [1]), precision="highest"
        )
        split = jnp.moveaxis(product, -1, lead + place)
    return split.reshape(x.shape)


def transform_operations(width: int) -> tuple[int, int]:
    """Return additions and multiplications of the transform of one vector.

    A Hadamard matrix of order q, one factor of the Kronecker product, needs q - 1 additions for each number; its scale
    and the signs belong to the factors. A cosine transform of the odd width q needs q multiplications too.
    """
    odd, orders = _factors(width)
    additions = width * (odd - 1 + sum(order - 1 for order in orders))
    return additions, width * odd if odd > 1 else 0


def _factors(width: int) -> tuple[int, tuple[int, ...]]:
    """Return the width of a cosine transform, 1 for none, and orders of Hadamard matrices, which together give one."""
    if (orders := _orders(width)) is not None:
        return 1, orders
    odd = width // (width & -width)
    return odd, _orders(width // odd) or ()


@functools.lru_cache
def _orders(width: int) -> tuple[int, ...] | None:
    """Return orders of Hadamard matrices whose product is the width, powers of two last; None if none are known."""
    odd = width // (width & -width)
    if odd == 1:
        return (2,) * (width.bit_length() - 1)
    for order in range(4, min(width, _WIDEST) + 1, 4):
        if width % order == 0 and order & (order - 1) and _paley(order) is not None:
            rest = _orders(width // order)
            if rest is not None:
                return (order, *rest)
    return None


def _paley(order: int) -> int | None:
    """Return the prime of Paley's first or second construction of an order, or None."""
    for prime, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if (
            prime > 2
            and prime % 4 == remainder
            and all(prime % d for d in range(2, math.isqrt(prime) + 1))
        ):
            return prime
    return None


def _hadamard(order: int) -> Float[np.ndarray, "order order"]:
    """Return a matrix of +-1 whose rows are orthogonal; the order is 2, or one of Paley's."""
    if order == 2:
        return np.array([[1.0, 1.0], [1.0, -1.0]])
    prime = _paley(order)
    assert prime is not None
    residues = {number * number % prime for number in range(1, prime)}
    character = np.array(
        [0, *(1 if number in residues else -1 for number in range(1, prime))], float
    )
    jacobsthal = character[(np.arange(prime)[:, None] - np.arange(prime)[None]) % prime]
    symmetric = prime % 4 == 1
    bordered = np.zeros((prime + 1, prime + 1))
    bordered[0, 1:] = 1
    bordered[1:, 0] = 1 if symmetric else -1
    bordered[1:, 1:] = jacobsthal
    if not symmetric:
        return np.eye(prime + 1) + bordered
    pair = np.array([[1.0, 1.0], [1.0, -1.0]])
    alone = np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.kron(bordered, pair) + np.kron(np.eye(prime + 1), alone)


def _cosine(width: int) -> Float[np.ndarray, "n n"]:
    """Return the orthonormal cosine transform DCT-II."""
    row = np.arange(width)[:, None]
    column = np.arange(width)[None]
    matrix = np.sqrt(2 / width) * np.cos(np.pi * (2 * column + 1) * row / (2 * width))
    matrix[0] /= math.sqrt(2)
    return matrix
