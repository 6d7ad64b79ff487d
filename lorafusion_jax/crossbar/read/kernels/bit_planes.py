"""Column sums by counting bits: the fastest for single input vectors, as in models that generate token by token.

The bits of the cells' levels and of the input slices lie 32 rows to a word. A conversion is then

    S = sum_{i, t} 2^(i + t) (#(positive & cell bit i & input bit t) - #(negative & ...))

with population counts, all fused with the ADC by XLA. Fast where the processor counts the bits of a whole vector at
once (AVX512_VPOPCNTDQ); right everywhere. Milliseconds of one such core (AMD EPYC) for a matrix on the arrays of
examples/smollm2/chip.yaml with a 6-bit ADC, here and by the path `packed`:

    576 x 1536      1 vector: 0.7, 3.5      16: 7.9, 9.8      128: 62, 61
    576 x 32        1 vector: 0.08, 0.16    16: 0.96, 0.29    128: 6.3, 1.4

A plan does not depend on the number of vectors, so matrices of few columns are read this way in batches too.

Axis letters: B batch, K weight slices, I bits of a cell, R row tiles, Q words of 32 rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from ...devices.physical import varying_as
from ...mapping.adc.quantiser import Converter
from ...mapping.encoding import split
from ...mapping.input_slices import digit, significance


def to_planes(cells: Float[Array, "K R rows cols"], bits: int) -> UInt32[Array, "K I 2 R Q cols"]:
    """Return the bit planes of integer cells of |g| < 2^bits: of the positive ones, then of the negative ones."""
    magnitude = jnp.abs(cells).astype(jnp.int32)
    planes = [
        [_to_words((sign * cells > 0) & (((magnitude >> i) & 1) == 1), axis=2) for sign in (1, -1)] for i in range(bits)
    ]
    return jnp.moveaxis(jnp.stack([jnp.stack(pair) for pair in planes]), 2, 0)


def pair_planes(
    codes: Float[Array, "d_in d_out"], rows: tuple[int, ...], slices: tuple[int, ...]
) -> UInt32[Array, "K I 2 R Q cols"]:
    """Return `to_planes` of perfect differential weights, one row tile at a time, straight from their codes."""
    first, place = np.cumsum((0, *slices))[:-1, None], np.arange(max(slices))
    # The bit of a code that each bit of a slice is, [K, I]; a narrow slice lacks the highest ones.
    bit, there = (first + place).astype(np.uint32), (place < np.array(slices)[:, None]).astype(np.uint32)

    def of_tile(tile: Float[Array, "rows d_out"]) -> UInt32[Array, "K I 2 Q d_out"]:
        padded = jnp.pad(tile.astype(jnp.int32), ((0, -len(tile) % 32), (0, 0)))
        sides = jnp.maximum(jnp.stack([padded, -padded]), 0).astype(jnp.uint32).reshape(2, -1, 32, tile.shape[1])
        shape = (*bit.shape, 2, sides.shape[1], tile.shape[1])
        shift, mask = (jax.lax.broadcast_in_dim(jnp.asarray(of_bit), shape, (0, 1)) for of_bit in (bit, there))

        def of_row(row: int) -> UInt32[Array, "K I 2 Q d_out"]:
            return ((jax.lax.broadcast_in_dim(sides[:, :, row], shape, (2, 3, 4)) >> shift) & mask) << np.uint32(row)

        # One row after the other: a sum over their axis is an order of magnitude slower on a CPU.
        return functools.reduce(jnp.bitwise_or, map(of_row, range(32)))

    return jnp.moveaxis(jax.lax.map(of_tile, split(codes, rows, 0, front=True)), 0, 3)


def planes(
    n: Float[Array, "B R rows"],
    cells: UInt32[Array, "K I 2 R Q cols"],
    adc: Converter,
    slices: tuple[int, ...],
    *,
    signed: bool,
) -> Float[Array, "K B cols"]:
    """Return the codes of all conversions, shifted and added over input slices and row tiles.

    Args:
      cells: from `to_planes`.
    """
    worth = jnp.asarray(significance(slices), n.dtype)

    def step(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        r, j = i // worth.size, i % worth.size
        u = digit(jax.lax.dynamic_index_in_dim(n, r, 1, keepdims=False), slices, j)
        of_tile = jax.lax.dynamic_index_in_dim(cells, r, 3, keepdims=False)
        driven = [((jnp.abs(u) >> t) & 1) == 1 for t in range(max(slices))]
        up = [_to_words(bit & (u > 0), axis=1) for bit in driven]
        down = [_to_words(bit & (u < 0), axis=1) for bit in driven] if signed else None

        def read(k: int, total: Float[Array, "B cols"]) -> Float[Array, "B cols"]:
            count = jnp.zeros(total.shape, jnp.int32)
            for bit, (positive, negative) in enumerate(of_tile[k]):
                for t in range(max(slices)):
                    counted = jnp.zeros(total.shape, jnp.int32)
                    for q in range(positive.shape[0]):
                        x, plus, minus = up[t][:, q, None], positive[None, q], negative[None, q]
                        more, less = x & plus, x & minus
                        if down is not None:
                            y = down[t][:, q, None]
                            more, less = more | (y & minus), less | (y & plus)
                        counted += jax.lax.population_count(more).astype(jnp.int32)
                        counted -= jax.lax.population_count(less).astype(jnp.int32)
                    count += counted << (bit + t)
            return total + worth[j] * adc(count.astype(n.dtype), adc.scale[k])

        return tuple(read(k, total) for k, total in enumerate(totals))

    zero = varying_as(jnp.zeros((n.shape[0], cells.shape[5]), n.dtype), n, cells, adc.scale)
    return jnp.stack(jax.lax.fori_loop(0, n.shape[1] * worth.size, step, (zero,) * cells.shape[0]))


def _to_words(bits: Bool[Array, "..."], axis: int) -> UInt32[Array, "..."]:
    """Pack an axis of bits into words of 32."""
    count = -(-bits.shape[axis] // 32)
    widths = [(0, 32 * count - bits.shape[axis] if a == axis else 0) for a in range(bits.ndim)]
    split = jnp.pad(bits, widths).reshape(*bits.shape[:axis], count, 32, *bits.shape[axis + 1 :])
    place = jnp.asarray(np.uint32(1) << np.arange(32, dtype=np.uint32))
    place = place.reshape(32, *[1] * (bits.ndim - axis - 1))
    shifted = split.astype(jnp.uint32) * jnp.broadcast_to(place, split.shape)
    return jnp.sum(shifted, axis=axis + 1, dtype=jnp.uint32)
