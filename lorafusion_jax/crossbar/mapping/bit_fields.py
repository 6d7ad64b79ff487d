"""Packing of several weight slices into one word, so that one sum of words gives all their column sums.

Slice k lies in a field of its word: word = sum_k g_k 2^(shift_k). Its sum over any subset of rows is

    sum_k S_k 2^(shift_k),   low_k <= S_k <= high_k,

where low and high follow from the cells of the column. With sum_k low_k 2^(shift_k) taken off, every field holds
S_k - low_k >= 0, and comes out whole by a shift and a mask as long as high_k - low_k fits it. That is the
certificate: it rests on the cells, whatever the inputs. In float32 a word has 24 bits and every partial sum is an
integer below 2^24, thus exact; in int32 it has 32, for sums wrap around without harm.

Axis letters: K weight slices, W words, R row tiles.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .input_slices import significance

FLOAT_BITS, INT_BITS = 24, 32


@dataclasses.dataclass(frozen=True)
class Packing:
    """Fields of the slices in words.

    Attributes:
      fields: (word, shift, bits) of every slice.
      variances: fields of the slices' variances, each in its slice's word; empty without read noise.
    """

    fields: tuple[tuple[int, int, int], ...]
    variances: tuple[tuple[int, int, int], ...] = ()

    @property
    def words(self) -> list[slice]:
        """The weight slices of each word."""
        at = [word for word, _, _ in self.fields]
        return [slice(at.index(w), at.index(w) + at.count(w)) for w in range(at[-1] + 1)]


class Packed(NamedTuple):
    """Slices in words.

    Attributes:
      words: [W, R, rows + 1, cols], the cells, and a row of -low that one level drives at every read.
      low: [K, R, cols], the least sum of every column.
      variances: [W, R, rows + 1, cols], what the squares of the inputs multiply; None without read noise.
    """

    words: Int[Array, "W R _rows cols"]
    low: Int[Array, "K R cols"]
    variances: Int[Array, "W R _rows cols"] | None = None


def extent(
    cells: Float[Array, "K R rows cols"] | Int[Array, "K R rows cols"], top: int, *, signed: bool
) -> tuple[Array, Array]:
    """Return the least and the largest sum, [K, R, cols] each, that inputs of at most `top` can cause."""
    positive = top * jnp.sum(jnp.maximum(cells, 0), axis=2, dtype=cells.dtype)
    negative = top * jnp.sum(jnp.minimum(cells, 0), axis=2, dtype=cells.dtype)
    return (negative - positive, positive - negative) if signed else (negative, positive)


def certify(spans: tuple[int, ...], word_bits: int, variances: tuple[int, ...] = ()) -> Packing | None:
    """Return the packing into as few words as neighbouring slices allow; None where a slice exceeds a word.

    Args:
      spans: for every slice the largest high - low of its columns; of all layers that share the packing.
      variances: for every slice the largest sum of u^2 v of its columns, if they travel along.
    """
    fields, squares, word, shift = [], [], 0, 0
    for span, variance in itertools.zip_longest(spans, variances):
        bits, more = max(span, 1).bit_length(), 0 if variance is None else max(variance, 1).bit_length()
        if bits + more > word_bits:
            return None
        if shift + bits + more > word_bits:
            word, shift = word + 1, 0
        fields.append((word, shift, bits))
        if variance is not None:
            squares.append((word, shift + bits, more))
        shift += bits + more
    return Packing(tuple(fields), tuple(squares))


def pack(
    cells: Float[Array, "K R rows cols"],
    packing: Packing,
    top: int,
    *,
    signed: bool,
    variances: Float[Array, "K R rows cols"] | None = None,
) -> Packed:
    """Pack integer cells whose spans the packing was made for."""
    whole = cells.astype(jnp.int32)
    low, _ = extent(whole, top, signed=signed)
    words = _join(jnp.concatenate([whole, -low[:, :, None]], axis=2), packing.fields, packing.words)
    if variances is None:
        return Packed(words, low)
    squares = jnp.pad(variances.astype(jnp.int32), ((0, 0), (0, 0), (0, 1), (0, 0)))
    return Packed(words, low, _join(squares, packing.variances, packing.words))


def pack_codes(
    tiles: Float[Array, "R rows d_out"], slices: tuple[int, ...], packing: Packing, top: int, *, signed: bool
) -> Packed:
    """Return `pack` of the signed digits of weight codes.

    Slice by slice, and rows added half to half, since stacked slices and other sums over rows take up to ten times as
    long on a CPU.
    """
    magnitude, sign = jnp.abs(tiles).astype(jnp.int32), jnp.sign(tiles).astype(jnp.int32)
    counted = magnitude if signed else jnp.where(tiles < 0, magnitude, 0)
    starts = np.cumsum((0, *slices))[:-1].tolist()

    def digit(of: Int[Array, "R rows d_out"], k: int) -> Int[Array, "R rows d_out"]:
        return (of >> starts[k]) & (2 ** slices[k] - 1)

    def low(k: int) -> Int[Array, "R 1 d_out"]:
        sums = digit(counted, k)
        rows = 1 << (sums.shape[1] - 1).bit_length()
        sums = jnp.pad(sums, ((0, 0), (0, rows - sums.shape[1]), (0, 0)))
        while (rows := rows // 2) > 0:
            sums = sums[:, :rows] + sums[:, rows:]
        return -top * sums

    lows = [low(k) for k in range(len(slices))]

    def word(own: range) -> Int[Array, "R _rows d_out"]:
        shifted = [digit(magnitude, k) << packing.fields[k][1] for k in own]
        bottom = [-lows[k] << packing.fields[k][1] for k in own]
        return jnp.concatenate([sum(shifted[1:], shifted[0]) * sign, sum(bottom[1:], bottom[0])], axis=1)

    words = [word(range(len(slices))[own]) for own in packing.words]
    return Packed(jnp.stack(words), jnp.stack([each[:, 0] for each in lows]))


def _join(planes: Array, fields: tuple[tuple[int, int, int], ...], words: list[slice]) -> Array:
    shifted = [plane << shift for plane, (_, shift, _) in zip(planes, fields, strict=True)]
    return jnp.stack([sum(shifted[own][1:], shifted[own][0]) for own in words])


def drive(n: Float[Array, "B R rows"], slices: tuple[int, ...]) -> Float[Array, "B R _rows"]:
    """Return input codes with that of the row of -low, one level in every input slice."""
    one = sum(significance(slices))
    return jnp.pad(n, ((0, 0), (0, 0), (0, 1)), constant_values=one)


def unpack(word: Int[Array, "*S"], fields: tuple[tuple[int, int, int], ...]) -> Int[Array, "k *S"]:
    """Return S - low for every slice, or V, that has one of `fields`, given the sum of their word."""
    shift, bits = (
        np.asarray(part, np.uint32).reshape(-1, *[1] * word.ndim) for part in list(zip(*fields, strict=True))[1:]
    )
    found = (jax.lax.bitcast_convert_type(word, jnp.uint32)[None] >> shift) & (2**bits - 1).astype(np.uint32)
    return jax.lax.bitcast_convert_type(found, jnp.int32)
