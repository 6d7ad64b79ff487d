"""Products of large batches by table look-up, for input slices of one bit: the fastest for many vectors on a CPU.

As in `lookup`, the sums of a few rows under all their inputs are tabulated, and each input adds up table entries. Here
an array's rows are added up in chunks. The sums of 32 rows of 2-bit cells fit 8 bits for any cells, so that one int32
word has those of four weight slices where the sums of whole arrays take two words. A shorter last array is not padded.

Axis letters: B batch, K weight slices, J input slices, M words or real slices, R row tiles, G groups of rows, L lanes,
which are the columns of a block for every word or slice.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, UInt8

from ...chip.chip import Chip
from ...chip.columns import Laid, Written
from ...devices.physical import varying_as
from ...mapping.adc.quantiser import Converter
from ...mapping.bit_fields import INT_BITS, Packing, certify, to_words, unpack
from ...mapping.encoding import digit
from ...mapping.geometry import significance
from ..conversion_noise import Noise
from .by_kernel import KernelPath, in_bytes, slices_of
from .path import narrow, products, quiet

# Lanes and inputs of a block, whose tables and sums stay in a core's second-level cache; entries of one table.
_LANES = 32
_BATCH = 256
_ENTRIES = 81
# rows of a chunk: fewer save no words, and of more XLA would unroll too much
_LEAST = 32
_MOST = 64


class TablesPath(KernelPath):
    """Never planned by itself: a whole model's large batches take it (see `Plan.tabulates`)."""

    name = "tables"
    needs = (narrow, quiet, products)

    def form(self, laid: Laid, written: Written) -> Laid:
        return in_bytes(laid, written)

    def codes(
        self,
        tiles: Float[Array, "B R rows"],
        columns: Any,
        adc: Converter,
        noise: Noise | None,
        chip: Chip,
    ) -> Float[Array, "k B _cols"]:
        levels = chip.geometry.levels
        rows = chip.geometry.rows
        of_columns = (
            levels * (len(columns) // len(levels)) if chip.plan.integers else None
        )
        unused = max(rows) - rows[-1] if tiles.shape[1] == len(rows) else 0
        return tables(
            tiles,
            columns,
            of_columns,
            adc,
            slices_of(chip),
            unused,
            signed=chip.config.signed_inputs,
        )


def tables(
    n: Float[Array, "B R rows"],
    cells: Num[Array, "K R rows cols"],
    levels: tuple[int, ...] | None,
    adc: Converter,
    slices: tuple[int, ...],
    unused: int,
    *,
    signed: bool,
) -> Float[Array, "K B cols"]:
    """Return the codes of all conversions, shifted and added over input slices and row tiles.

    Args:
      cells: in level units.
      levels: highest level of every weight slice; None for real-valued cells.
      slices: bits of the input slices, one or two each.
      unused: first rows of the last tile that hold no cells.
    """
    batch, tiles, rows = n.shape
    cols = cells.shape[3]
    top = 2 ** max(slices) - 1
    digits = range(-top if signed else 0, top + 1)
    inputs = math.ceil(batch / math.ceil(batch / _BATCH))
    group = _group(len(digits), inputs * len(slices))
    height = _MOST
    packing = None
    if levels is not None:
        height, packing = _fields(
            [top * level for level in levels], min(max(rows, group), _MOST)
        )
    groups = math.ceil(rows / group)
    ends = _ends(groups, max(1, height // group))  # of chunks
    tall = groups * group
    empty = sum(
        end * group <= tall - rows + unused for end in ends
    )  # chunks of the last tile
    each = (
        max(end - start for start, end in itertools.pairwise([0, *ends])) * group
    )  # rows of a chunk
    zero = (
        np.zeros(0, np.int64) if levels is None else np.asarray(levels) * (top * each)
    )
    if packing is not None:
        cells = to_words(cells.astype(jnp.int32), packing)
    width = math.ceil(cols / math.ceil(cols * len(cells) / _LANES))
    lanes = len(cells) * width
    cells = jnp.pad(cells, ((0, 0), (0, 0), (tall - rows, 0), (0, -cols % width)))
    blocks = (
        cells.reshape(len(cells), tiles, tall, -1, width)
        .transpose(3, 1, 2, 0, 4)
        .reshape(-1, tiles, tall, lanes)
    )
    n = jnp.pad(n, ((0, -batch % inputs), (0, 0), (tall - rows, 0))).reshape(
        -1, inputs, tiles, tall
    )
    worth = jnp.asarray(significance(slices), n.dtype)
    bias = [] if packing is None else [_bias(zero, packing, width)]

    def convert(sums: list[Num[Array, "B L"]]) -> list[Float[Array, "_k B _L"]]:
        """Return the codes of every word, or of all real slices, given the sums of the chunks."""
        if packing is None:
            scale = jnp.repeat(adc.scale, width, total_repeat_length=lanes)
            return [adc(_total(sums), scale[None])[None]]
        found = []
        for m, own in enumerate(packing.words):
            fields = [
                unpack(part[:, m * width : (m + 1) * width], packing.fields[own])
                for part in sums
            ]
            low = (len(sums) * zero[own]).astype(np.int32)[:, None, None]
            found.append(
                adc((_total(fields) - low).astype(n.dtype), adc.scale[own, None, None])
            )
        return found

    def of_inputs(n: Float[Array, "B R rows"]) -> Float[Array, "N K B C"]:
        of_rows = entries_of(n, slices, digits, group)

        def of_block(block: Num[Array, "R rows L"]) -> Float[Array, "K B C"]:
            def tile(
                i: Array, carry: tuple[list[Array], list[Array]]
            ) -> tuple[list[Array], list[Array]]:
                r = (
                    tiles - 1 - i
                )  # the last tile first: chunks that it leaves out are still at zero
                table = _table(
                    jax.lax.dynamic_index_in_dim(block, r, 0, keepdims=False),
                    digits,
                    group,
                )
                of_tile = jax.lax.dynamic_index_in_dim(of_rows, r, 0, keepdims=False)

                def step(
                    j: Array, carry: tuple[list[Array], list[Array]]
                ) -> tuple[list[Array], list[Array]]:
                    chosen = jax.lax.dynamic_index_in_dim(of_tile, j, 0, keepdims=False)

                    def add(first: int, end: int) -> Num[Array, "B L"]:
                        picked = [
                            table[g].at[chosen[:, g]].get(mode="promise_in_bounds")
                            for g in range(first, end)
                        ]
                        return _total([*picked, *bias])

                    totals, sums = carry
                    # A loop of one trip, or none, as far as XLA can tell: otherwise it would add up a chunk anew for
                    # every weight slice.
                    sums = [
                        jax.lax.fori_loop(
                            jnp.where(i == 0, int(c < empty), 0),
                            jnp.minimum(j + 1, 1),
                            lambda _, s, groups=groups: add(*groups),
                            of_chunk,
                        )
                        for c, (groups, of_chunk) in enumerate(
                            zip(itertools.pairwise([0, *ends]), sums, strict=True)
                        )
                    ]
                    codes = convert(sums)
                    return [
                        total + worth[j] * of_word
                        for total, of_word in zip(totals, codes, strict=True)
                    ], sums

                return jax.lax.fori_loop(0, len(slices), step, carry)

            shapes = [(1, inputs, lanes)]
            if packing is not None:
                shapes = [
                    (own.stop - own.start, inputs, width) for own in packing.words
                ]
            totals = [jnp.zeros(shape, n.dtype) for shape in shapes]
            sums = [sum(bias, jnp.zeros((inputs, lanes), cells.dtype))] * len(ends)
            carry = (
                [varying_as(s, n, cells, adc.scale) for s in totals],
                [varying_as(s, n, cells) for s in sums],
            )
            totals, _ = jax.lax.fori_loop(0, tiles, tile, carry)
            if packing is None:
                return jnp.moveaxis(totals[0][0].reshape(inputs, -1, width), 1, 0)
            return jnp.concatenate(totals)

        return jax.lax.map(of_block, blocks)

    found = jax.lax.map(of_inputs, n)  # [batches, blocks, K, inputs, width]
    return found.transpose(2, 0, 3, 1, 4).reshape(found.shape[2], len(n) * inputs, -1)[
        :, :batch, :cols
    ]


def _group(base: int, inputs: int) -> int:
    """Return the number of rows that share a table. One entry takes about as long as three look-ups."""
    sizes = [group for group in range(1, 8) if base**group <= _ENTRIES]
    return min(sizes, key=lambda group: (3 * base**group + inputs) / group)


def _fields(levels: Sequence[int], rows: int) -> tuple[int, Packing]:
    """Return the rows of a chunk and the packing of their sums, given the largest of one row, into the fewest words."""
    choices = []
    for height in sorted({rows, min(rows, _LEAST)}, reverse=True):
        packing = certify([2 * height * level for level in levels], INT_BITS)
        assert packing is not None
        choices.append((height, packing))
    return min(choices, key=lambda choice: len(choice[1].words))


def _ends(groups: int, most: int) -> list[int]:
    """Return the last group, plus one, of as few chunks as possible of almost equal numbers of groups."""
    count = math.ceil(groups / most)
    return [groups * (c + 1) // count for c in range(count)]


def _bias(zero: np.ndarray, packing: Packing, width: int) -> Int[Array, "1 L"]:
    """Return the words of a sum of zero in every lane."""
    words = np.zeros(len(packing.words), np.uint32)
    for (word, shift, _), low in zip(packing.fields, zero, strict=True):
        words[word] += np.uint32(int(low) << shift)
    return jnp.asarray(np.repeat(words.view(np.int32), width)[None])


def entries_of(
    n: Float[Array, "B R rows"],
    slices: tuple[int, ...],
    digits: Sequence[int],
    group: int,
) -> UInt8[Array, "R J B G"]:
    """Return which table entry every group of so many rows selects: its digits, as a number."""
    apart = jnp.moveaxis(
        n.reshape(*n.shape[:2], -1, group), (3, 1), (0, 1)
    )  # [group, R, B, G], whose copy is short
    found = [
        _total(
            [
                (digit(row, slices, j) - digits[0]) * len(digits) ** i
                for i, row in enumerate(apart)
            ]
        )
        for j in range(len(slices))
    ]
    return jnp.stack(found, axis=1).astype(jnp.uint8)


def _table(
    plane: Num[Array, "rows L"], digits: range, group: int
) -> Num[Array, "_G E L"]:
    """Return the sums of every group of rows, for each row at any of the digits."""
    # Another group of zeros, so that XLA copies the rows: it would read each entry's at a place that it computes anew.
    rows = jnp.pad(
        plane.reshape(-1, group, 1, plane.shape[1]), ((0, 1), (0, 0), (0, 0), (0, 0))
    )
    entries = np.arange(len(digits) ** group)
    driven = [
        np.asarray(digits)[entries // len(digits) ** i % len(digits)]
        for i in range(group)
    ]
    return _total(
        [
            jnp.asarray(of_row, plane.dtype)[None, :, None] * rows[:, i]
            for i, of_row in enumerate(driven)
        ]
    )


def _total(parts: Sequence[Array]) -> Array:
    return sum(parts[1:], parts[0])
