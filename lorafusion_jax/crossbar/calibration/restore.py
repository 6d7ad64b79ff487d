"""Corrections of a model's chips in closed form, from unlabelled inputs: least squares, matrix by matrix.

The digital model runs once over the inputs. A tap at every product (see `whole_model`) multiplies by the digital
matrix, reads the chip with the same inputs, and finds the moments of both outputs. Each input vector has the weight
1 / mean square of its digital outputs: otherwise the few tokens with massive activations decide the fit.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..chip.chip import Chip, Correction, by_name, chips_in, numbers_per_rank
from ..read.matmul import matmul
from .one_chip import check_numbers
from .whole_model import Counted, Run, summed

# More singular directions than so many times the mean rank are not considered for one matrix.
_MOST_RANKS = 8


class _Moments(NamedTuple):
    """Weighted sums over input vectors x, with digital outputs y and reads z; matrices only for low rank.

    Attributes:
      count: number of input vectors, unweighted, and `one` the sum of their weights.
      y, z, yz, zz: [*N, d_out] sums of the outputs and their products.
      xx: [*N, d_in, d_in] sum of x x^T, and `xe` [*N, d_in, d_out] that of x (y - z)^T.
    """

    count: Any
    one: Any
    y: Any
    z: Any
    yz: Any
    zz: Any
    xx: Any = None
    xe: Any = None


def _moments(
    x: Float[Array, "*B d_in"],
    chip: Chip,
    matrix: Float[Array, "d_in d_out"],
    *,
    low_rank: bool,
) -> tuple[Float[Array, "*B d_out"], _Moments]:
    """Return the digital product, and the moments of it and of the chip's read."""
    rows = x.reshape(-1, x.shape[-1]).astype(matrix.dtype)
    y = jnp.dot(rows, matrix, precision="highest")
    z = matmul(rows, dataclasses.replace(chip, correction=None))
    power = jnp.mean(jnp.square(y), axis=1, keepdims=True)
    weight = jnp.where(power > 0, 1 / jnp.where(power > 0, power, 1), 0)
    weighted_y = weight * y
    weighted_z = weight * z
    xx = None
    xe = None
    if low_rank:
        xx = jnp.dot(rows.T, weight * rows, precision="highest")
        xe = jnp.dot(rows.T, weighted_y - weighted_z, precision="highest")
    moments = _Moments(
        count=jnp.asarray(len(rows), matrix.dtype),
        one=jnp.sum(weight),
        y=jnp.sum(weighted_y, axis=0),
        z=jnp.sum(weighted_z, axis=0),
        yz=jnp.sum(weighted_y * z, axis=0),
        zz=jnp.sum(weighted_z * z, axis=0),
        xx=xx,
        xe=xe,
    )
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype), moments


_READS = {
    low_rank: functools.partial(_moments, low_rank=low_rank)
    for low_rank in (False, True)
}


def _zeros(chip: Chip, low_rank: bool) -> _Moments:
    *lead, d_in, d_out = chip.shape
    column_sums = (jnp.zeros((*lead, d_out)) for _ in range(4))
    pair = (jnp.zeros((*lead, d_in, d)) if low_rank else None for d in (d_in, d_out))
    return _Moments(jnp.zeros(lead), jnp.zeros(lead), *column_sums, *pair)


def fit_corrections(
    run: Run,
    weights: Any,
    matrices: Sequence[Float[Array, "*N d_in d_out"]],
    batches: Iterable[Any],
    *,
    offsets: bool = False,
    numbers: int = 0,
    ridge: float = 1e-2,
    counted: Counted | None = None,
) -> dict[str, Correction]:
    """Return the corrections whose reads of the batches are closest to the digital products, chip by chip.

    A chip's reads need no more than the batches' input vectors, each once. Its cells are not written.

    Args:
      run: function from weights and a batch to an array that depends on every product, such as logits.
      weights: tree with calibrated chips.
      matrices: digital matrices of the chips, in the order of `chips_in`: a kernel of `nnx.Conv` as
        `kernel.reshape(-1, kernel.shape[-1])`.
      batches: inputs, without labels.
      offsets: fit an offset of each column, next to its factor.
      numbers: numbers that matrices of low rank may have in all. They go to the directions that remove the most of the
        remaining error, relative to the outputs, for their numbers (reduced-rank regression).
      ridge: pulls scales towards 1 and matrices towards 0, but not offsets: share of the mean power that is added to
        each column or direction; above 0 with `numbers`.
      counted: inputs that are no padding, as for `moments`.

    Raises:
      ValueError: there are no batches, they do not read one of the chips or bring NaN, chips share a name, a matrix
        has another shape than its chip, or `numbers` or `ridge` is out of its range.
    """
    chips = chips_in(weights)
    by_name(chips)  # refuses a name of two chips
    if type(numbers) is not int or numbers < 0:
        raise ValueError(f"numbers = {numbers!r}: give a whole number of at least 0")
    if not 0 <= ridge < math.inf or (numbers and not ridge):
        raise ValueError(
            f"ridge = {ridge}: give a finite share, above 0 with numbers and else at least 0"
        )
    if offsets and numbers:
        raise ValueError(
            "offsets are fitted without matrices of low rank: leave out one of them"
        )
    if len(matrices) != len(chips):
        raise ValueError(
            f"{len(matrices)} matrices for {len(chips)} chips: expected one for each, in their order"
        )
    for chip, matrix in zip(chips, matrices, strict=True):
        if chip.shape != matrix.shape:
            wrong = f"the matrix of {chip.name} has the shape {matrix.shape}: expected {chip.shape}"
            raise ValueError(wrong + _reshaped(chip, matrix))
    zeros = [_zeros(chip, numbers > 0) for chip in chips]
    arguments = [(matrix,) for matrix in matrices]
    total = summed(
        run, weights, batches, _READS[numbers > 0], zeros, arguments, counted
    )
    for chip, seen in zip(chips, total, strict=True):
        if not np.all(np.asarray(seen.count) > 0):
            raise ValueError(
                f"{chip.name} was read by none of the batches: give batches that use all chips"
            )
        check_numbers(chip, seen.yz)
    most = math.ceil(_MOST_RANKS * numbers / numbers_per_rank(matrices))
    corrections = {}
    directions = []
    for chip, matrix in zip(chips, matrices, strict=True):
        seen = jax.tree.map(np.asarray, total.pop(0))  # freed one after the other
        scale = _blend(seen.yz, seen.zz, ridge)
        offset = None
        if offsets:
            count = np.where(seen.one > 0, seen.one, 1)[..., None]
            scale = _blend(
                seen.yz - seen.y * seen.z / count,
                seen.zz - np.square(seen.z) / count,
                ridge,
            )
            offset = (seen.y - scale * seen.z) / count
        if numbers:
            fewest = seen.count.min()
            if fewest < matrix.shape[-2]:
                warnings.warn(
                    f"{chip.name} was read with {fewest:.0f} vectors, fewer than its {matrix.shape[-2]} inputs: "
                    f"the ridge of {ridge:g} decides what they leave open; give more text, or a larger ridge",
                    stacklevel=2,
                )
            for index in np.ndindex(matrix.shape[:-2]):
                matrix_moments = jax.tree.map(
                    lambda leaf, index=index: leaf[index], seen
                )
                try:
                    direction = _low_rank(
                        matrix_moments,
                        np.asarray(matrix[index], float),
                        scale[index].astype(float),
                        ridge,
                        most,
                    )
                except np.linalg.LinAlgError:
                    raise ValueError(
                        f"the inputs of {chip.name} do not determine its matrix of low rank: give more text, or a "
                        f"larger ridge than {ridge:g}"
                    ) from None
                directions.append((chip.name, index, *direction))
        corrections[chip.name] = Correction(
            **jax.tree.map(jnp.asarray, {"scale": scale, "offset": offset})
        )
    shapes = {chip.name: chip.shape for chip in chips}
    return _with_low_rank(corrections, directions, shapes, numbers)


def _reshaped(chip: Chip, matrix: Array) -> str:
    """Return the way from a layer's kernel to the matrix of its chip, for a message."""
    d_out = matrix.shape[-1] if matrix.ndim else 0
    if matrix.size and chip.shape == (matrix.size // d_out, d_out):
        return f". If it is a kernel of {matrix.shape[:-1]} inputs in this order, give kernel.reshape(-1, {d_out})"
    return ""


def _blend(product: np.ndarray, power: np.ndarray, ridge: float) -> np.ndarray:
    """Return the least-squares factor of each column, pulled towards 1."""
    pull = ridge * power.mean(axis=-1, keepdims=True)
    pulled = power + pull
    return np.where(pulled > 0, (product + pull) / np.where(pulled > 0, pulled, 1), 1)


def _low_rank(
    seen: _Moments, matrix: np.ndarray, scale: np.ndarray, ridge: float, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the `most` leading directions U, V of the remaining error, and the share of power that each removes.

    With C = sum x x^T and D = sum x (y - z)^T, the remaining error has the moments
    M = sum x (y - s z)^T = D s + C W (1 - s), and the best matrix of rank r is L^-T (L^-1 M)_r with C = L L^T.
    """
    moments = seen.xx.astype(float)
    mean = max(np.trace(moments) / len(moments), np.finfo(np.float32).tiny)
    root = np.linalg.cholesky(moments + ridge * mean * np.eye(len(moments)))
    whitened = np.linalg.solve(root, seen.xe * scale + (moments @ matrix) * (1 - scale))
    # The leading singular vectors of a matrix are eigenvectors of its smaller Gram matrix, which are found faster.
    wide = whitened.shape[0] <= whitened.shape[1]
    power, vectors = np.linalg.eigh(
        whitened @ whitened.T if wide else whitened.T @ whitened
    )
    power = power[: -most - 1 : -1]
    vectors = vectors[:, : -most - 1 : -1]
    left, right = (
        (vectors, vectors.T @ whitened) if wide else (whitened @ vectors, vectors.T)
    )
    balance = np.sqrt(np.sqrt(np.maximum(power, np.finfo(np.float32).tiny)))
    left, right = (
        (left * balance, right / balance[:, None])
        if wide
        else (left / balance, right * balance[:, None])
    )
    gain = np.maximum(power, 0) / (max(seen.one, 1e-30) * len(scale))
    return (
        np.linalg.solve(root.T, left).astype(np.float32),
        right.astype(np.float32),
        gain,
    )


def _with_low_rank(
    corrections: dict[str, Correction],
    directions: list[tuple[str, tuple[int, ...], np.ndarray, np.ndarray, np.ndarray]],
    shapes: dict[str, tuple[int, ...]],
    numbers: int,
) -> dict[str, Correction]:
    """Return the corrections with the directions that remove most for their numbers, as many as the numbers allow."""
    choices = [
        (gain / (len(left) + right.shape[1]), len(left) + right.shape[1], number)
        for number, (_, _, left, right, gains) in enumerate(directions)
        for gain in gains
    ]
    ranks = [0] * len(directions)
    left_over = numbers
    for _, cost, number in sorted(choices, key=lambda choice: -choice[0]):
        if cost <= left_over:
            ranks[number] = ranks[number] + 1
            left_over = left_over - cost
    corrected = dict(corrections)
    for name in dict.fromkeys(name for name, *_ in directions):
        *lead, d_in, d_out = shapes[name]
        chosen = [
            (d, rank) for d, rank in zip(directions, ranks, strict=True) if d[0] == name
        ]
        widest = max(1, *(rank for _, rank in chosen))
        U = np.zeros((*lead, d_in, widest), np.float32)
        V = np.zeros((*lead, widest, d_out), np.float32)
        for (_, index, left, right, _), rank in chosen:
            U[(*index, slice(None), slice(rank))] = left[:, :rank]
            V[(*index, slice(rank))] = right[:rank]
        corrected[name] = dataclasses.replace(
            corrected[name], U=jnp.asarray(U), V=jnp.asarray(V)
        )
    return corrected
