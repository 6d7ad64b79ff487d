"""Products of row tiles and input slices, with the ADC in their epilogue: the paths `loop` and `packed`.

Real-valued cells take one product for each weight slice. Integers share words: two or three column sums come out
of one float32 product; `mapping.bit_fields` has the certificate.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ...support.platform import for_cpu, is_traced
from ..chip.chip import Chip
from ..chip.plan import ON_REQUEST, ColumnLayout, ProgrammedCells, ReadRequirements
from ..devices.physical import varying_as
from ..mapping import decoding, encoding
from ..mapping.adc.quantiser import Converter
from ..mapping.bit_fields import (
    FLOAT_BITS,
    BitFields,
    FieldWords,
    certify,
    combine,
    drive,
    over_rows,
    unpack,
)
from ..mapping.encoding import digit
from ..mapping.geometry import significance
from .conversion_noise import (
    Noise,
    add_noise,
    alike,
    deviations,
    of_conversions,
    stream,
)
from .definition import ReadPath


def sliced_products(
    n: Float[Array, "B R rows"], adc: Converter, noise: Noise | None, chip: Chip
) -> Float[Array, "K B cols"]:
    """Return the codes of all conversions, shifted and added over input slices and row tiles.

    Columns are in level units: real numbers, or integers in words of `bit_fields.FLOAT_BITS`. Planes that are not
    `occupied` are skipped. The variances of `noise` are not read where words hold them.
    """
    bit_fields = chip.plan.bit_fields
    slices = chip.geometry.converted_slices  # None for an ideal DAC
    occupied = chip.occupied
    cells = chip.columns
    assert cells is not None
    if isinstance(cells, FieldWords):
        assert bit_fields is not None and slices is not None
        n = drive(n, slices)
        words = bit_fields.words
        operands = (
            [cells.words] if cells.variances is None else [cells.words, cells.variances]
        )
    else:
        cells = cells.astype(n.dtype)
        words = [slice(k, k + 1) for k in range(len(cells))]
        operands = [cells] if noise is None else [cells, noise.variance]
    worth = jnp.asarray((1.0,) if slices is None else significance(slices), n.dtype)

    def tile(r: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        x = jax.lax.dynamic_index_in_dim(n, r, 1, keepdims=False)
        low = (
            jax.lax.dynamic_index_in_dim(cells.low, r, 1, keepdims=False)
            if isinstance(cells, FieldWords)
            else None
        )

        def plane(operand: Array, w: int) -> Float[Array, "rows _cols"]:
            # In a single slice: `operand[w]` first would be copied in every step, for all row tiles.
            word_plane = jax.lax.dynamic_slice(
                operand, (w, r, 0, 0), (1, 1, *operand.shape[2:])
            )
            return jnp.squeeze(word_plane, (0, 1)).astype(n.dtype)

        planes = [
            [plane(operand, w) for w in range(len(words))] for operand in operands
        ]

        def step(j: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            u = x if slices is None else digit(x, slices, j).astype(n.dtype)

            def read(
                w: int, planes_of_word: slice, total: Float[Array, "k B cols"]
            ) -> Float[Array, "k B cols"]:
                factors = zip((u, u * u), planes, strict=False)
                products = [
                    jnp.dot(factor, word_planes[w], precision="highest")
                    for factor, word_planes in factors
                ]
                least = None if low is None else low[planes_of_word, None]
                sums, variance = separated(
                    products, bit_fields, planes_of_word, least, n.dtype
                )
                if noise is not None:
                    if variance is None:
                        variance = alike(
                            u[:, : noise.variance.shape[2]],
                            noise.variance[planes_of_word, r, :, 0],
                        )
                    sums = add_noise(
                        sums,
                        variance,
                        noise,
                        r * worth.size + j,
                        (planes_of_word.start, 0, 0),
                        sums.shape[2],
                    )
                return total + worth[j] * adc.of_slices(sums, planes_of_word, j)

            if occupied is None:
                return tuple(
                    read(w, *pair)
                    for w, pair in enumerate(zip(words, totals, strict=True))
                )
            return tuple(
                jax.lax.cond(
                    occupied[k, r],
                    lambda total, k=k: read(k, words[k], total),
                    lambda total: total,
                    total,
                )
                for k, total in enumerate(totals)
            )

        return jax.lax.fori_loop(0, worth.size, step, totals)

    zeros = (
        jnp.zeros(
            (planes_of_word.stop - planes_of_word.start, len(n), operands[0].shape[3]),
            n.dtype,
        )
        for planes_of_word in words
    )
    zero = tuple(
        varying_as(word_zeros, n, cells, adc.scale, occupied, noise)
        for word_zeros in zeros
    )
    return jnp.concatenate(jax.lax.fori_loop(0, n.shape[1], tile, zero))


def separated(
    products: list[Array],
    bit_fields: BitFields | None,
    planes: slice,
    low: Int[Array, "k #B cols"] | None,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "k B cols"], Float[Array, "k B _cols"] | None]:
    """Return the column sums of some planes and their variances, or None, given products with both, or with words."""
    if bit_fields is None or low is None:
        sums = products[0][None]
        return sums, products[1][None] if len(products) > 1 else None
    integers = [product.astype(jnp.int32) for product in products]
    word = sum(integers[1:], integers[0])
    sums = (unpack(word, bit_fields.fields[planes]) + low).astype(dtype)
    if not bit_fields.variances:
        return sums, None
    return sums, unpack(word, bit_fields.variances[planes]).astype(dtype)


class KernelPath(ReadPath):
    """A path of conversions that are products of slices."""

    def refusal(self, requirements: ReadRequirements) -> str | None:
        if requirements.unlike_products:
            return f"cannot compute {requirements.unlike_products}"
        return None

    def form(self, layout: ColumnLayout, programmed: ProgrammedCells) -> ColumnLayout:
        """Return the columns in the form that `codes` needs, given those of real numbers."""
        return layout

    def codes(
        self,
        n: Float[Array, "B R rows"],
        adc: Converter,
        noise: Noise | None,
        chip: Chip,
    ) -> Float[Array, "k B _cols"]:
        """Return the codes of all conversions, shifted and added over input slices and row tiles."""
        return sliced_products(n, adc, noise, chip)

    def lay_out(self, programmed: ProgrammedCells) -> ColumnLayout:
        return self.form(
            ColumnLayout(programmed.plan, programmed.columns(), programmed.variance()),
            programmed,
        )

    def read(
        self, n: Float[Array, "B d_in"], quantise: Converter | None, chip: Chip
    ) -> Float[Array, "B d_out"]:
        assert quantise is not None
        rows = chip.geometry.rows
        tiles = encoding.split(n, rows, axis=1, front=True)
        if chip.scale.shape[0] == 1 and quantise.scale.shape[0] == 1:
            return self._of_tiles(tiles, 0, quantise, chip) * chip.scale

        # Row tiles whose weights, or ADCs, have separate ranges are added up as outputs.
        def add(
            y: Array, tile: tuple[Array, Any, Array, Array, Array]
        ) -> tuple[Array, None]:
            x, parts, adc_scale, scale, number = tile
            columns, variance, occupied = jax.tree.map(
                lambda a: jnp.expand_dims(a, 1), parts
            )
            tile_chip = dataclasses.replace(
                chip, columns=columns, variance=variance, occupied=occupied
            )
            of_tile = self._of_tiles(
                x[:, None], number, quantise._replace(scale=adc_scale[None]), tile_chip
            )
            return y + of_tile * scale[None], None

        zero = varying_as(jnp.zeros((n.shape[0], chip.shape[1]), n.dtype), n, chip)
        by_tile = jax.tree.map(
            lambda a: jnp.moveaxis(a, 1, 0),
            (chip.columns, chip.variance, chip.occupied),
        )
        adc_scale = jnp.broadcast_to(
            quantise.scale, (len(rows), quantise.scale.shape[1])
        )
        scale = jnp.broadcast_to(chip.scale, (len(rows), chip.scale.shape[1]))
        return jax.lax.scan(
            add,
            zero,
            (
                jnp.moveaxis(tiles, 1, 0),
                by_tile,
                adc_scale,
                scale,
                jnp.arange(len(rows)),
            ),
        )[0]

    def _of_tiles(
        self,
        tiles: Float[Array, "B R rows"],
        number: Array | int,
        quantise: Converter,
        chip: Chip,
    ) -> Float[Array, "B d_out"]:
        """Return the product of row tiles of one scale, which begin with this number."""
        geometry = chip.geometry
        config = chip.config
        d_out = chip.shape[1]
        each = 2 if config.converts_each else 1
        adc = quantise._replace(scale=jnp.tile(quantise.scale[0], each))
        if adc.merged is not None:
            adc = adc._replace(merged=jnp.tile(adc.merged, (each, 1)))
        noise = _noise(2 * number, chip, tiles.dtype)
        total = self.codes(tiles, adc, noise, chip)
        if each == 2:
            total = total[: len(total) // 2] - total[len(total) // 2 :]
        whole = encoding.split(total[..., :d_out], geometry.cols, axis=2)
        if config.encoding.unit_column:
            whole = jnp.concatenate([whole, total[..., d_out:, None]], axis=3)
        ones = jnp.sum(tiles, axis=(1, 2))[:, None, None]
        whole = decoding.with_left_out(whole, tiles, quantise, geometry, config)
        return decoding.finish(whole, ones, quantise, None, geometry, config)


def _noise(number: Array | int, chip: Chip, dtype: jnp.dtype) -> Noise | None:
    """Return the noise of a read, whose stream has this number."""
    geometry = chip.geometry
    config = chip.config
    variance = chip.variance
    columns = cast(Any, chip.columns)
    if not config.draws_at_conversion or chip.key is None:
        return None
    each = 2 if config.converts_each else 1
    words = stream(jax.random.fold_in(chip.key, number))
    scale = deviations(geometry, config, dtype)
    of_adc = of_conversions(geometry, config, dtype)
    if variance is None and not isinstance(columns, FieldWords):  # quiet cells
        variance = jnp.zeros((*columns.shape[:3], 1), dtype)
    elif variance is None and columns.variances is None:
        row_tiles = columns.low.shape[1]
        read = columns.words.shape[2] - 1
        variance = jnp.zeros((len(columns.low), row_tiles, read, 1), dtype)
    return Noise(
        variance,
        jnp.tile(scale, each),
        words,
        None if of_adc is None else jnp.tile(of_adc, each),
    )


class LoopPath(KernelPath):
    """The fastest on a CPU where nothing is saved by tables or words; also elsewhere, if conversions draw noise."""

    name = "loop"

    def chosen(self, requirements: ReadRequirements) -> str | None:
        if not for_cpu():
            return "one draw of the noise for each conversion, where `definition` draws every cell's"
        return "the ADC quantises each conversion: one product each, with the ADC in its epilogue"

    def form(self, layout: ColumnLayout, programmed: ProgrammedCells) -> ColumnLayout:
        """Return the path `packed` unless this one was requested or is equally fast."""
        plan = layout.plan
        config = programmed.config
        count = len(layout.columns)
        if plan.reason != ON_REQUEST and not config.converts_sums:
            packed = in_words(layout, programmed, FLOAT_BITS)
            if packed is not None and (products := len(packed.columns.words)) < count:
                reason = (
                    f"{count} conversions come out of {products} products of integers"
                )
                plan = dataclasses.replace(
                    packed.plan, path=PackedPath.name, reason=reason
                )
                return packed._replace(plan=plan)
        stopped = config.adc is not None and isinstance(config.adc.bits, tuple)
        if plan.integers and not config.draws_at_conversion and not stopped:
            layout = layout._replace(occupied=jnp.any(layout.columns != 0, axis=(2, 3)))
        return layout


class PackedPath(KernelPath):
    """Planned as `loop`, until the columns are known."""

    name = "packed"

    def refusal(self, requirements: ReadRequirements) -> str | None:
        if not requirements.integers:
            return (
                "takes integer cells: perfect ones, whose Gmin does not reach the ADC"
            )
        return super().refusal(requirements)

    def form(self, layout: ColumnLayout, programmed: ProgrammedCells) -> ColumnLayout:
        packed = in_words(layout, programmed, FLOAT_BITS)
        if packed is None:
            raise ValueError(
                f"path='packed': sums and variances of noise are no integers of {FLOAT_BITS} bits: leave path out"
            )
        return packed


def in_words(
    layout: ColumnLayout, programmed: ProgrammedCells, word_bits: int
) -> ColumnLayout | None:
    """Return the columns in words, or None if sums or variances are no integers, or do not fit.

    Variances that are alike for all columns stay next to the words. Bit fields are certified by the columns' own sums
    if these are known, else by the largest sums of any weights.
    """
    geometry = programmed.geometry
    config = programmed.config
    columns = layout.columns
    variance = layout.variance
    squares = None
    if variance is not None and variance.shape[3] > 1:
        squares = variance
        variance = None
        # Squares of halves, and of levels with Gmin, are not integers.
        if config.encoding.two_sided or config.cell.on_off_ratio is not None:
            return None
    if not layout.plan.integers:
        return None
    top = geometry.converted_top

    def largest(cells: Array, power: int) -> list[int]:
        if is_traced(cells):
            levels = geometry.levels * (len(columns) // len(geometry.levels))
            return [geometry.tallest * (top * level) ** power for level in levels]
        return [
            top**power * int(slice_level)
            for slice_level in np.max(np.asarray(over_rows(cells)), axis=(1, 2))
        ]

    signed = config.signed_inputs
    spans = [(1 + signed) * most for most in largest(jnp.abs(columns), 1)]
    bit_fields = certify(
        spans, word_bits, () if squares is None else largest(squares, 2)
    )
    if bit_fields is None:
        return None
    words = combine(columns, bit_fields, top, signed=signed, variances=squares)
    plan = dataclasses.replace(layout.plan, bit_fields=bit_fields)
    return layout._replace(plan=plan, columns=words, variance=variance)
