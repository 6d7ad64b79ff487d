"""Products by table look-up, for inputs that come in narrow slices.

A few rows of an array can be driven in only a few ways: g rows under one-bit pulses in 2^g. The sums of all of them
are tabulated, and each input adds up one table entry for every g rows where a product takes g multiplications
("four Russians"). The entries are contiguous rows of a table that stays in the cache. Integer cells travel in words,
several weight slices to an int32 word (see `mapping.bit_fields`). Noise of conversions would take longer than the sums.

The fastest for input slices of one bit, of integer cells or without a sign. It compiles twice as slowly as `packed`, so
whole models do not use it.

Axis letters: B batch, K weight slices, k those of one word, J input slices, W words, R row tiles, G groups of rows,
E table entries, C columns of a block.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from ...support.platform import for_cpu
from ..chip.chip import Chip
from ..chip.plan import ColumnLayout, ProgrammedCells, ReadRequirements
from ..devices.physical import varying_as
from ..mapping.adc.quantiser import Converter
from ..mapping.bit_fields import INT_BITS, FieldWords, drive
from ..mapping.encoding import digit
from ..mapping.geometry import significance
from .conversion_noise import Noise
from .sliced_products import KernelPath, in_words, separated

# A block of columns whose table, and a chunk of the batch whose sums, stay in a core's second-level cache.
_COLUMNS = 64
_BATCH = 256


class LookupPath(KernelPath):
    """The fastest on a CPU for input slices of one bit, of integer cells or without a sign."""

    name = "lookup"

    def refusal(self, requirements: ReadRequirements) -> str | None:
        if requirements.bits > 2:  # 4 levels at most, or 7 with a sign
            return "takes input slices of up to 2 bits: set dac.slice_bits"
        if requirements.config.draws_at_conversion:
            return "draws no noise"
        return super().refusal(requirements)

    def chosen(self, requirements: ReadRequirements) -> str | None:
        if (
            for_cpu()
            and requirements.bits == 1
            and not requirements.config.draws_at_conversion
            and (requirements.integers or not requirements.config.signed_inputs)
        ):
            return "input slices have one bit: sums of a few rows come from tables"
        return None

    def form(self, layout: ColumnLayout, programmed: ProgrammedCells) -> ColumnLayout:
        return in_words(layout, programmed, INT_BITS) or layout

    def codes(
        self,
        n: Float[Array, "B R rows"],
        adc: Converter,
        noise: Noise | None,
        chip: Chip,
    ) -> Float[Array, "k B _cols"]:
        return lookup(n, adc, chip)


def lookup(
    n: Float[Array, "B R rows"], adc: Converter, chip: Chip
) -> Float[Array, "K B cols"]:
    """Return the codes of all conversions, shifted and added over input slices and row tiles."""
    bit_fields = chip.plan.bit_fields
    slices = chip.geometry.converted_slices
    cells = chip.columns
    assert slices is not None and cells is not None
    batch = n.shape[0]
    cols = (cells.words if isinstance(cells, FieldWords) else cells).shape[3]
    blocks = math.ceil(cols / _COLUMNS)
    chunks = math.ceil(batch / _BATCH)
    width = math.ceil(cols / blocks)
    size = math.ceil(batch / chunks)
    top = 2 ** max(slices) - 1
    digits = list(range(-top if chip.config.signed_inputs else 0, top + 1))
    group = _group(len(digits), size * len(slices))
    worth = jnp.asarray(significance(slices), n.dtype)
    planes: Num[Array, "W R _rows cols"]
    low = None
    if isinstance(cells, FieldWords):
        assert bit_fields is not None
        n = drive(n, slices)
        members = bit_fields.words
        low = _pad(cells.low, -1, blocks * width)
        planes = cells.words
    else:
        members = [slice(k, k + 1) for k in range(cells.shape[0])]
        planes = cells = cells.astype(n.dtype)
    planes = _pad(planes, -1, blocks * width)

    def of_chunk(n: Float[Array, "B R rows"]) -> Float[Array, "N K B C"]:
        rows = (n.shape[2] // group + 1) * group
        chosen = _entries(_pad(n, 2, rows), slices, digits, group)

        def read(
            w: int, r: Array, c: Array, total: Float[Array, "k B C"]
        ) -> Float[Array, "k B C"]:
            """Add the codes of word w, of row tile r and column block c."""
            own = members[w]
            first = c * width
            plane = jax.lax.dynamic_slice(
                planes, (w, r, 0, first), (1, 1, planes.shape[2], width)
            )[0, 0]
            table = _table(plane, digits, group)
            least = (
                None
                if low is None
                else jax.lax.dynamic_slice(
                    low[own], (0, r, first), (len(total), 1, width)
                )
            )

            def add(j: int | Array) -> Num[Array, "B C"]:
                of_slice = jax.lax.dynamic_slice(
                    chosen, (r, j, 0, 0), (1, 1, *chosen.shape[2:])
                )[0, 0]
                return _add_entries(table, of_slice)

            def convert(total: Array, added: Array, j: int | Array) -> Array:
                sums, _ = separated([added], bit_fields, own, least, n.dtype)
                return total + worth[j] * adc.of_slices(sums, own, j)

            def step(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
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
            zero = tuple(varying_as(of_word, n, cells, adc.scale) for of_word in zeros)
            return jnp.concatenate(jax.lax.fori_loop(0, n.shape[1], tile, zero))

        return jax.lax.map(of_block, jnp.arange(blocks))

    n = _pad(n, 0, chunks * size).reshape(chunks, size, *n.shape[1:])
    found = jax.lax.map(of_chunk, n)  # [chunks, blocks, K, size, width]
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
    plane: Num[Array, "rows C"], digits: Sequence[int], group: int
) -> Num[Array, "G E C"]:
    """Return the sums of every group of rows of a plane, for each row under any of the digits."""
    # A row of zeros is always added, so that XLA copies the plane instead of reading it scattered.
    groups = plane.shape[0] // group + 1
    base = len(digits)
    rows = _pad(plane, 0, groups * group).reshape(groups, group, 1, -1)
    # An odd number of entries, so that the tables of all groups do not compete for the same lines of the cache.
    entries = np.arange(base**group | 1)
    terms = []
    for i in range(group):
        driven = np.asarray(digits)[entries // base**i % base]
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
