"""Combination of several weight slices into one word, so that one sum of words gives all their column sums.

Slice k lies in a field of its word: word = sum_k g_k 2^(shift_k). Its sum over any subset of rows is

    sum_k S_k 2^(shift_k),   low_k <= S_k <= high_k,

where low and high follow from the cells of the column, for any inputs. With sum_k low_k 2^(shift_k) taken off, a shift
and a mask give S_k - low_k >= 0, if high_k - low_k fits its field: that is the certificate. In float32 a word has 24
bits, because every partial sum is an integer below 2^24; in int32 it has 32, because sums wrap around without harm.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from .geometry import significance

FLOAT_BITS = 24
INT_BITS = 32


@dataclasses.dataclass(frozen=True)
class BitFields:
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
        return [
            slice(at.index(w), at.index(w) + at.count(w)) for w in range(at[-1] + 1)
        ]


class FieldWords(NamedTuple):
    """Slices in words.

    Attributes:
      words: [W, R, rows + 1, cols], the cells, and a row of -low that one level drives at every read.
      low: [K, R, cols], the least sum of every column.
      variances: [W, R, rows + 1, cols], what the squares of the inputs multiply; None without read noise.
    """

    words: Int[Array, "W R _rows cols"]
    low: Int[Array, "K R cols"]
    variances: Int[Array, "W R _rows cols"] | None = None


def over_rows(cells: Num[Array, "K R rows cols"]) -> Num[Array, "K R cols"]:
    """Return sums over rows, half added to half: XLA's take up to ten times as long on a CPU."""
    rows = 1 << (cells.shape[2] - 1).bit_length()
    sums = jnp.pad(cells, ((0, 0), (0, 0), (0, rows - cells.shape[2]), (0, 0)))
    while (rows := rows // 2) > 0:
        sums = sums[:, :, :rows] + sums[:, :, rows:]
    return sums[:, :, 0]


def certify(
    spans: Sequence[int], word_bits: int, variances: Sequence[int] = ()
) -> BitFields | None:
    """Return bit fields in as few words as neighbouring slices allow; None where a slice exceeds a word.

    Spans are the largest high - low of every slice's columns, variances their largest sum of u^2 v, if words hold
    them as well.
    """
    fields = []
    squares = []
    word = 0
    shift = 0
    for span, variance in itertools.zip_longest(spans, variances):
        bits = max(span, 1).bit_length()
        variance_bits = 0 if variance is None else max(variance, 1).bit_length()
        if bits + variance_bits > word_bits:
            return None
        if shift + bits + variance_bits > word_bits:
            word = word + 1
            shift = 0
        fields.append((word, shift, bits))
        if variance is not None:
            squares.append((word, shift + bits, variance_bits))
        shift += bits + variance_bits
    return BitFields(tuple(fields), tuple(squares))


def combine(
    cells: Float[Array, "K R rows cols"],
    bit_fields: BitFields,
    top: int,
    *,
    signed: bool,
    variances: Float[Array, "K R rows cols"] | None = None,
) -> FieldWords:
    """Pack integer cells under inputs of at most `top`, which may be `signed`."""
    low = -top * over_rows(jnp.abs(cells) if signed else jnp.maximum(-cells, 0)).astype(
        jnp.int32
    )

    def to_words(planes: Array, fields: tuple[tuple[int, int, int], ...]) -> Array:
        shifts = np.asarray(fields)[:, 1, None, None, None]
        shifted = planes << shifts.astype(np.int32)
        sums = [jnp.sum(shifted[word], 0, jnp.int32) for word in bit_fields.words]
        return jnp.stack(sums)

    rows = jnp.concatenate([cells.astype(jnp.int32), -low[:, :, None]], axis=2)
    words = to_words(rows, bit_fields.fields)
    if variances is None:
        return FieldWords(words, low)
    squares = jnp.pad(variances.astype(jnp.int32), ((0, 0), (0, 0), (0, 1), (0, 0)))
    return FieldWords(words, low, to_words(squares, bit_fields.variances))


def drive(
    n: Float[Array, "B R rows"], slices: tuple[int, ...]
) -> Float[Array, "B R _rows"]:
    """Return input codes with that of the row of -low, one level in every input slice."""
    full_code = sum(significance(slices))
    return jnp.pad(n, ((0, 0), (0, 0), (0, 1)), constant_values=full_code)


def unpack(
    word: Int[Array, "*S"], fields: tuple[tuple[int, int, int], ...]
) -> Int[Array, "k *S"]:
    """Return S - low for every slice, or V, that has one of `fields`, given the sum of their word."""
    shift, bits = np.asarray(fields, np.uint32)[:, 1:].T.reshape(
        2, -1, *[1] * word.ndim
    )
    shifted = (jax.lax.bitcast_convert_type(word, jnp.uint32)[None] >> shift) & (
        2**bits - 1
    ).astype(np.uint32)
    return jax.lax.bitcast_convert_type(shifted, jnp.int32)
