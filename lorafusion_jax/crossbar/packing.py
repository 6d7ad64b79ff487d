"""Several weight slices in one word, whose column sums come out of one sum of words.

Slice k lies in a field of its word: word = sum_k g_k 2^(shift_k). Its sum over any subset of rows is

    sum_k S_k 2^(shift_k),   low_k <= S_k <= high_k,

where low and high follow from the cells of the column. With sum_k low_k 2^(shift_k) taken off, every field holds
S_k - low_k >= 0, and comes out whole by a shift and a mask as long as high_k - low_k fits it. That is the
certificate: it rests on the cells, whatever the inputs. In float32 a word has 24 bits and every partial sum is an
integer below 2^24, thus exact; in int32 it has 32, for sums wrap around without harm.

Axis letters: K weight slices, W words, R row tiles.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .pulses import start

FLOAT_BITS, INT_BITS = 24, 32


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where every slice lies: (word, shift, bits) each."""

    fields: tuple[tuple[int, int, int], ...]

    @property
    def words(self) -> int:
        return self.fields[-1][0] + 1


class Packed(NamedTuple):
    """Slices in words.

    Attributes:
      words: [W, R, rows + 1, cols], the cells, and a row of -low that one level drives at every read.
      low: [K, R, cols], the least sum of every column.
    """

    words: Int[Array, "W R _rows cols"]
    low: Int[Array, "K R cols"]


def extent(cells: Float[Array, "K R rows cols"], top: int, *, signed: bool) -> tuple[Array, Array]:
    """Return the least and the largest sum, [K, R, cols] each, that inputs of at most `top` can cause.

    Args:
      cells: integers.
      top: largest |u| of an input slice.
      signed: whether inputs may be negative.
    """
    positive = top * jnp.sum(jnp.maximum(cells, 0), axis=2)
    negative = top * jnp.sum(jnp.minimum(cells, 0), axis=2)
    return (negative - positive, positive - negative) if signed else (negative, positive)


def certify(spans: tuple[int, ...], word_bits: int) -> Packing | None:
    """Return the packing into as few words as neighbouring slices allow; None where a slice exceeds a word.

    Args:
      spans: for every slice the largest high - low of its columns; of all layers that share the packing.
      word_bits: FLOAT_BITS or INT_BITS.
    """
    fields, word, shift = [], 0, 0
    for span in spans:
        bits = max(span, 1).bit_length()
        if bits > word_bits:
            return None
        if shift + bits > word_bits:
            word, shift = word + 1, 0
        fields.append((word, shift, bits))
        shift += bits
    return Packing(tuple(fields))


def pack(cells: Float[Array, "K R rows cols"], packing: Packing, top: int, *, signed: bool) -> Packed:
    """Pack integer cells whose spans the packing was made for."""
    whole = cells.astype(jnp.int32)
    low, _ = extent(whole, top, signed=signed)
    rows = jnp.concatenate([whole, -low[:, :, None]], axis=2)
    words = []
    for w in range(packing.words):
        parts = [rows[k] << shift for k, (at, shift, _) in enumerate(packing.fields) if at == w]
        words.append(sum(parts[1:], parts[0]))
    return Packed(jnp.stack(words), low)


def drive(n: Float[Array, "B R rows"], slices: tuple[int, ...]) -> Float[Array, "B R _rows"]:
    """Return input codes with that of the row of -low, one level in every input slice."""
    one = float(sum(2 ** start(slices, j) for j in range(len(slices))))
    return jnp.pad(n, ((0, 0), (0, 0), (0, 1)), constant_values=one)


def unpack(word: Int[Array, "*S"], packing: Packing, w: int) -> list[tuple[int, Int[Array, "*S"]]]:
    """Return (slice, S - low) for every slice in word w, given the word's sum."""
    unsigned = jax.lax.bitcast_convert_type(word, jnp.uint32)
    found = []
    for k, (at, shift, bits) in enumerate(packing.fields):
        if at == w:
            field = (unsigned >> np.uint32(shift)) & np.uint32(2**bits - 1)
            found.append((k, jax.lax.bitcast_convert_type(field, jnp.int32)))
    return found
