"""Products by table look-up, for inputs that come in narrow slices.

A few rows of an array can be driven in only a few ways: g rows under one-bit pulses in 2^g. The sums of all of them
are tabulated, and each input adds up one table entry for every g rows where a product takes g multiplications
("four Russians"). The entries are contiguous rows of a table that stays in the cache, so that XLA's loop over
columns is one vector load and addition each. Integer cells travel packed, several weight slices to an int32 word
(see `packing`).

Axis letters: B batch, K weight slices, J input slices, W words, R row tiles, G groups of rows, E table entries.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, UInt8

from .adc import Converter
from .packing import Packed, Packing, drive, unpack
from .pulses import digit, start

# A block of columns whose table, and a chunk of the batch whose sums, stay in a core's second-level cache.
_COLUMNS = 64
_BATCH = 256


def lookup(
    n: Float[Array, "B R rows"],
    cells: Packed | Float[Array, "K R rows cols"],
    packing: Packing | None,
    adc: Converter,
    slices: tuple[int, ...],
    *,
    signed: bool,
) -> Float[Array, "K B cols"]:
    """Return the codes of all conversions, shifted and added over input slices and row tiles.

    Args:
      n: input codes.
      cells: in level units; packed, or real-valued.
      packing: of packed cells; None for real ones.
      adc: the quantiser of each weight slice.
      slices: bits of every input slice.
      signed: whether codes may be negative.
    """
    batch, cols = n.shape[0], (cells if packing is None else cells.words).shape[3]
    blocks, chunks = math.ceil(cols / _COLUMNS), math.ceil(batch / _BATCH)
    width, size = math.ceil(cols / blocks), math.ceil(batch / chunks)
    n = _pad(n if packing is None else drive(n, slices), 0, chunks * size)
    operands = (cells, None) if packing is None else cells
    words, low = (None if a is None else _pad(a, -1, blocks * width) for a in operands)
    top = 2 ** max(slices) - 1
    digits = range(-top if signed else 0, top + 1)
    group = _group(len(digits), size * len(slices))
    worth = 2.0 ** np.asarray([start(slices, j) for j in range(len(slices))])

    def of_chunk(n: Float[Array, "B R rows"]) -> Float[Array, "N K B C"]:
        entries = _entries(n, slices, digits, group)

        def of_block(c: Int[Array, ""]) -> Float[Array, "K B C"]:
            def tile(r: Int[Array, ""], totals: tuple[Array, ...]) -> tuple[Array, ...]:
                def here(a: Array) -> Array:
                    starts = (0, r, *[0] * (a.ndim - 3), c * width)
                    return jax.lax.dynamic_slice(a, starts, (a.shape[0], 1, *a.shape[2:-1], width))[:, 0]

                for w, plane in enumerate(here(words)):
                    table = _table(plane, digits, group)

                    def add(j: int | Array, table: Array = table) -> Num[Array, "B C"]:
                        return _add_entries(table, jax.lax.dynamic_slice(entries, (r, j, 0, 0), (1, 1, *entries.shape[2:]))[0, 0])

                    def convert(totals: tuple[Array, ...], sums: Array, j: int | Array, w: int = w) -> tuple[Array, ...]:
                        found = list(totals)
                        if packing is None:
                            of_word = [(w, sums)]
                        else:
                            of_word = [(k, (field + here(low)[k, None]).astype(n.dtype)) for k, field in unpack(sums, packing, w)]
                        for k, total in of_word:
                            found[k] += jnp.asarray(worth, n.dtype)[j] * adc(total, adc.inv_lsb[k])
                        return tuple(found)

                    def step(j, carry):
                        totals, sums = carry
                        return convert(totals, sums, j - 1), add(j)

                    totals, sums = jax.lax.fori_loop(1, len(slices), step, (totals, add(0)))
                    totals = convert(totals, sums, len(slices) - 1)
                return totals

            zero = jnp.zeros((size, width), n.dtype)
            return jnp.stack(jax.lax.fori_loop(0, n.shape[1], tile, (zero,) * adc.inv_lsb.shape[0]))

        return jax.lax.map(of_block, jnp.arange(blocks))

    found = jax.lax.map(of_chunk, n.reshape(chunks, size, *n.shape[1:]))  # [chunks, blocks, K, size, width]
    return found.transpose(2, 0, 3, 1, 4).reshape(found.shape[2], chunks * size, -1)[:, :batch, :cols]


def _pad(a: Array, axis: int, size: int) -> Array:
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, size - a.shape[axis])
    return a if a.shape[axis] == size else jnp.pad(a, widths)


def _group(base: int, inputs: int) -> int:
    """Return how many rows share a table: one that pays for its making, and stays in the cache."""
    group = 1
    while base ** (group + 1) <= min(inputs / 4, 32):
        group += 1
    return group


def _entries(
    n: Float[Array, "B R rows"], slices: tuple[int, ...], digits: range, group: int
) -> UInt8[Array, "R J B G"]:
    """Return which table entry every group of rows selects: its digits, as a number."""
    groups = n.shape[2] // group + 1
    n = _pad(n, 2, groups * group)

    def of_tile(codes: Float[Array, "B rows"]) -> UInt8[Array, "J B G"]:
        found = []
        for j in range(len(slices)):
            values = (digit(codes, slices, j) - digits[0]).reshape(codes.shape[0], groups, group)
            found.append(sum((values[:, :, i] * len(digits) ** i for i in range(1, group)), values[:, :, 0]))
        return jnp.stack(found).astype(jnp.uint8)

    return jax.lax.map(of_tile, jnp.moveaxis(n, 1, 0))


def _table(plane: Num[Array, "rows C"], digits: range, group: int) -> Num[Array, "G E C"]:
    """Return the sums of every group of rows for all of their digits."""
    groups, base = plane.shape[0] // group + 1, len(digits)
    plane = _pad(plane, 0, groups * group).reshape(groups, group, 1, -1)
    # An odd number of entries, lest the tables of all groups compete for the same lines of the cache.
    entries = np.arange(base**group | 1)
    driven = [jnp.asarray(entries // base**i % base + digits[0], plane.dtype)[None, :, None] for i in range(group)]
    return sum((u * plane[:, i] for i, u in enumerate(driven[1:], 1)), driven[0] * plane[:, 0])


def _add_entries(table: Num[Array, "G E C"], entries: UInt8[Array, "B G"]) -> Num[Array, "B C"]:
    """Return the sum over groups of the entries that each input selects."""
    total = table[0].at[entries[:, 0]].get(mode="promise_in_bounds")
    for g in range(1, table.shape[0]):
        total += table[g].at[entries[:, g]].get(mode="promise_in_bounds")
    return total
