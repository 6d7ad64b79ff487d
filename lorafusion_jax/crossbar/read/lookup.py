"""Products by table look-up, for inputs that come in narrow slices.

A few rows of an array can be driven in only a few ways: g rows under one-bit pulses in 2^g. The sums of all of them
are tabulated, and each input adds up one table entry for every g rows where a product takes g multiplications
("four Russians"). The entries are contiguous rows of a table that stays in the cache. Integer cells travel in words,
several weight slices to an int32 word (see `mapping.bit_fields`), with their variances for read noise.

The fastest for input slices of one bit, of integer cells or without a sign. It compiles twice as slowly as `packed`, so
whole models do not use it.

Axis letters: B batch, K weight slices, k those of one word, J input slices, W words, R row tiles, G groups of rows,
E table entries, C columns of a block.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from ...support.platform import for_cpu
from ..chip.chip import Chip
from ..chip.plan import ColumnLayout, ProgrammedCells, ReadRequirements
from ..devices.physical import varying_as
from ..mapping.adc.quantiser import Converter
from ..mapping.bit_fields import INT_BITS, BitFields, FieldWords, drive, unpack
from ..mapping.encoding import digit
from ..mapping.geometry import significance
from .conversion_noise import Noise, add_noise, alike
from .sliced_products import KernelPath, certificate, fit_words, in_words

# A block of columns whose table, and a chunk of the batch whose sums, stay in a core's second-level cache.
_COLUMNS = 64
_BATCH = 256


class LookupPath(KernelPath):
    """The fastest on a CPU for input slices of one bit, of integer cells or without a sign."""

    name = "lookup"

    def refusal(self, requirements: ReadRequirements) -> str | None:
        if requirements.bits > 2:  # 4 levels at most, or 7 with a sign
            return "takes input slices of up to 2 bits: set dac.slice_bits"
        return super().refusal(requirements)

    def chosen(self, requirements: ReadRequirements) -> str | None:
        if (
            for_cpu()
            and requirements.bits == 1
            and (requirements.integers or not requirements.config.signed_inputs)
        ):
            return "input slices have one bit: sums of a few rows come from tables"
        return None

    def form(self, layout: ColumnLayout, programmed: ProgrammedCells) -> ColumnLayout:
        bit_fields = (
            certificate(layout, programmed, INT_BITS)[1]
            if fit_words(layout, programmed)
            else None
        )
        return (
            layout if bit_fields is None else in_words(layout, programmed, bit_fields)
        )

    def codes(
        self,
        tiles: Float[Array, "B R rows"],
        columns: Any,
        adc: Converter,
        noise: Noise | None,
        chip: Chip,
    ) -> Float[Array, "k B _cols"]:
        slices = chip.geometry.converted_slices
        assert slices is not None
        return lookup(
            tiles,
            columns,
            chip.plan.bit_fields,
            adc,
            slices,
            signed=chip.config.signed_inputs,
            noise=noise,
        )


def lookup(
    n: Float[Array, "B R rows"],
    cells: FieldWords | Float[Array, "K R rows cols"],
    bit_fields: BitFields | None,
    adc: Converter,
    slices: tuple[int, ...],
    *,
    signed: bool,
    noise: Noise | None = None,
) -> Float[Array, "K B cols"]:
    """Return the codes of all conversions, shifted and added over input slices and row tiles.

    Cells are in level units. The variances of `noise` are not read where words hold them.
    """
    batch = n.shape[0]
    cols = (cells.words if isinstance(cells, FieldWords) else cells).shape[3]
    blocks = math.ceil(cols / _COLUMNS)
    chunks = math.ceil(batch / _BATCH)
    width = math.ceil(cols / blocks)
    size = math.ceil(batch / chunks)
    top = 2 ** max(slices) - 1
    digits = list(range(-top if signed else 0, top + 1))
    squares = [d * d for d in digits]
    group = _group(len(digits), size * len(slices))
    worth = jnp.asarray(significance(slices), n.dtype)
    # What is tabulated, once for each word: sums of a list of planes under digits or their squares.
    low = None
    if isinstance(cells, FieldWords):
        assert bit_fields is not None
        n = drive(n, slices)
        members = bit_fields.words
        low = _pad(cells.low, -1, blocks * width)
        sources = [[(cells.words, digits)]]
        if cells.variances is not None:
            sources[0].append((cells.variances, squares))
    else:
        members = [slice(k, k + 1) for k in range(cells.shape[0])]
        sources = [[(cells, digits)]]
        if noise is not None and noise.variance.shape[3] > 1:
            sources.append([(noise.variance, squares)])
    tabulated = [
        [(_pad(planes, -1, blocks * width), levels) for planes, levels in parts]
        for parts in sources
    ]

    def of_chunk(
        argument: tuple[Float[Array, "B R rows"], Array],
    ) -> Float[Array, "N K B C"]:
        n, chunk = argument
        rows = (n.shape[2] // group + 1) * group
        chosen = _entries(_pad(n, 2, rows), slices, digits, group)

        def read(
            w: int, r: Array, c: Array, total: Float[Array, "k B C"]
        ) -> Float[Array, "k B C"]:
            """Add the codes of word w, of row tile r and column block c."""
            own = members[w]
            first = c * width

            def plane(planes: Num[Array, "W R rows cols"]) -> Num[Array, "rows C"]:
                return jax.lax.dynamic_slice(
                    planes, (w, r, 0, first), (1, 1, planes.shape[2], width)
                )[0, 0]

            tables = [
                _table([(plane(planes), levels) for planes, levels in parts], group)
                for parts in tabulated
            ]
            least = (
                None
                if low is None
                else jax.lax.dynamic_slice(
                    low[own], (0, r, first), (len(total), 1, width)
                )
            )

            def add(j: int | Array) -> list[Num[Array, "B C"]]:
                of_slice = jax.lax.dynamic_slice(
                    chosen, (r, j, 0, 0), (1, 1, *chosen.shape[2:])
                )[0, 0]
                return [_add_entries(table, of_slice) for table in tables]

            def convert(total: Array, added: list[Array], j: int | Array) -> Array:
                variance = None
                if bit_fields is None or least is None:
                    sums = added[0][None]
                    variance = added[1][None] if len(added) > 1 else None
                else:
                    sums = (unpack(added[0], bit_fields.fields[own]) + least).astype(
                        n.dtype
                    )
                    if bit_fields.variances:
                        variance = unpack(added[0], bit_fields.variances[own]).astype(
                            n.dtype
                        )
                if noise is not None:
                    if variance is None:
                        u = digit(n[:, r, : noise.variance.shape[2]], slices, j).astype(
                            n.dtype
                        )
                        variance = alike(u, noise.variance[own, r, :, 0])
                    place = jnp.asarray(r * len(slices) + j)
                    sums = add_noise(
                        sums,
                        variance,
                        noise,
                        place,
                        (own.start, chunk * size, first),
                        cols,
                    )
                return total + worth[j] * adc.of_slices(sums, own, j)

            def step(
                j: Array, carry: tuple[Array, list[Array]]
            ) -> tuple[Array, list[Array]]:
                # Sums wait for the next step: in the same one XLA would add them up anew for every slice.
                total, added = carry
                return convert(total, added, j - 1), add(j)

            total, added = jax.lax.fori_loop(1, len(slices), step, (total, add(0)))
            return convert(total, added, len(slices) - 1)

        def of_block(c: Array) -> Float[Array, "K B C"]:
            def tile(r: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
                return tuple(read(w, r, c, total) for w, total in enumerate(totals))

            zeros = (
                jnp.zeros((own.stop - own.start, size, width), n.dtype)
                for own in members
            )
            zero = tuple(
                varying_as(of_word, n, cells, adc.scale, noise) for of_word in zeros
            )
            return jnp.concatenate(jax.lax.fori_loop(0, n.shape[1], tile, zero))

        return jax.lax.map(of_block, jnp.arange(blocks))

    n = _pad(n, 0, chunks * size).reshape(chunks, size, *n.shape[1:])
    found = jax.lax.map(
        of_chunk, (n, jnp.arange(chunks))
    )  # [chunks, blocks, K, size, width]
    return found.transpose(2, 0, 3, 1, 4).reshape(found.shape[2], chunks * size, -1)[
        :, :batch, :cols
    ]


def _pad(a: Array, axis: int, size: int) -> Array:
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, size - a.shape[axis])
    return a if a.shape[axis] == size else jnp.pad(a, widths)


def _group(base: int, inputs: int) -> int:
    """Return the number of rows that share a table, chosen so that it saves time and stays in the cache."""
    group = 1
    while base ** (group + 1) <= min(inputs / 4, 32):
        group += 1
    return group


def _entries(
    n: Float[Array, "B R rows"],
    slices: tuple[int, ...],
    digits: Sequence[int],
    group: int,
) -> UInt8[Array, "R J B G"]:
    """Return which table entry every group of so many rows selects: its digits, as a number."""
    apart = jnp.moveaxis(
        n.reshape(*n.shape[:2], -1, group), (3, 1), (0, 1)
    )  # [group, R, B, G], whose copy is short
    entries = []
    for j in range(len(slices)):
        terms = [
            (digit(row, slices, j) - digits[0]) * len(digits) ** i
            for i, row in enumerate(apart)
        ]
        entries.append(sum(terms[1:], terms[0]))
    return jnp.stack(entries, axis=1).astype(jnp.uint8)


def _table(
    parts: list[tuple[Num[Array, "rows C"], list[int]]], group: int
) -> Num[Array, "G E C"]:
    """Return the sums of every group of rows of some planes, for each row at any of the plane's levels."""
    terms = []
    for plane, levels in parts:
        # A row of zeros is always added, so that XLA copies the plane instead of reading it scattered.
        groups = plane.shape[0] // group + 1
        base = len(levels)
        rows = _pad(plane, 0, groups * group).reshape(groups, group, 1, -1)
        # An odd number of entries, so that the tables of all groups do not compete for the same lines of the cache.
        entries = np.arange(base**group | 1)
        for i in range(group):
            driven = np.asarray(levels)[entries // base**i % base]
            terms.append(jnp.asarray(driven, plane.dtype)[None, :, None] * rows[:, i])
    return sum(terms[1:], terms[0])


def _add_entries(
    table: Num[Array, "G E C"], entries: UInt8[Array, "B G"]
) -> Num[Array, "B C"]:
    """Return the sum over groups of the entries that each input selects."""
    total = table[0].at[entries[:, 0]].get(mode="promise_in_bounds")
    for g in range(1, table.shape[0]):
        total += table[g].at[entries[:, g]].get(mode="promise_in_bounds")
    return total
