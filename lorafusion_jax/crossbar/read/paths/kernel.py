"""Read paths whose conversions a kernel makes, from input codes and columns to codes summed over slices and tiles.

`loop` is one product for each row tile, weight slice and input slice, with the ADC in its epilogue. In `packed`
several weight slices of integer cells share a float32 word, and their sums come out of one product.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ....support.platform import for_cpu, is_traced
from ...chip.chip import Chip
from ...chip.columns import Laid, Written
from ...chip.plan import ON_REQUEST, Facts
from ...devices.physical import varying_as
from ...mapping import decoding, encoding
from ...mapping.adc.quantiser import Converter
from ...mapping.bit_fields import (
    FLOAT_BITS,
    BitFields,
    FieldWords,
    certify,
    combine,
    over_rows,
)
from ...mapping.geometry import Columns
from ..conversion_noise import Noise, deviations, of_conversions, stream
from .path import ReadPath
from .sliced_products import sliced_products


class KernelPath(ReadPath):
    """A path of conversions that are products of slices."""

    def refusal(self, facts: Facts) -> str | None:
        if facts.unlike_products:
            return f"cannot compute {facts.unlike_products}"
        return None

    def form(self, laid: Laid, written: Written) -> Laid:
        """Return the columns in the form that `codes` needs, given those of real numbers."""
        return laid

    def codes(
        self,
        tiles: Float[Array, "B R rows"],
        columns: Any,
        adc: Converter,
        noise: Noise | None,
        chip: Chip,
    ) -> Float[Array, "k B _cols"]:
        """Return the codes of all conversions, shifted and added over input slices and row tiles."""
        bit_fields = chip.plan.bit_fields
        slices = chip.geometry.converted_slices
        columns = columns if bit_fields else columns.astype(tiles.dtype)
        return sliced_products(
            tiles, columns, bit_fields, adc, slices, chip.occupied, noise
        )

    def lay_out(self, written: Written) -> Laid:
        return self.form(
            Laid(written.plan, written.columns(), written.variance()), written
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
        def along(
            move: Callable[[Array], Array], parts: dict[str, Any]
        ) -> dict[str, Any]:
            return {name: jax.tree.map(move, part) for name, part in parts.items()}

        def add(
            y: Array, tile: tuple[Array, dict[str, Any], Array, Array, Array]
        ) -> tuple[Array, None]:
            x, parts, adc_scale, scale, number = tile
            own = dataclasses.replace(
                chip, **along(lambda a: jnp.expand_dims(a, 1), parts)
            )
            of_tile = self._of_tiles(
                x[:, None], number, quantise._replace(scale=adc_scale[None]), own
            )
            return y + of_tile * scale[None], None

        zero = varying_as(jnp.zeros((n.shape[0], chip.shape[1]), n.dtype), n, chip)
        by_tile = {
            "columns": chip.columns,
            "variance": chip.variance,
            "occupied": chip.occupied,
        }
        by_tile = along(lambda a: jnp.moveaxis(a, 1, 0), by_tile)
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
        noise = _noise(2 * number, chip, tiles.dtype)
        total = self.codes(tiles, chip.columns, adc, noise, chip)
        if each == 2:
            total = total[: len(total) // 2] - total[len(total) // 2 :]
        whole = encoding.split(total[..., :d_out], geometry.cols, axis=2)
        if config.encoding.unit_column:
            whole = jnp.concatenate([whole, total[..., d_out:, None]], axis=3)
        ones = jnp.sum(tiles, axis=(1, 2))[:, None, None]
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

    def chosen(self, facts: Facts) -> str | None:
        if not for_cpu():
            return "one draw of the noise for each conversion, where `definition` draws every cell's"
        return "the ADC quantises each conversion: one product each, with the ADC in its epilogue"

    def form(self, laid: Laid, written: Written) -> Laid:
        """Return the path `packed` unless this one was requested or is equally fast."""
        plan = laid.plan
        config = written.config
        count = len(laid.columns)
        if fit_words(laid, written):
            _, bit_fields = certificate(laid, written, FLOAT_BITS)
            as_fast = (
                bit_fields is None
                or config.converts_sums
                or len(bit_fields.words) == count
            )
            if bit_fields is not None and not as_fast and plan.reason != ON_REQUEST:
                reason = f"{count} conversions come out of {len(bit_fields.words)} products of integers"
                plan = dataclasses.replace(plan, path=PackedPath.name, reason=reason)
                return in_words(laid._replace(plan=plan), written, bit_fields)
        if plan.integers and not config.draws_at_conversion:
            laid = laid._replace(occupied=jnp.any(laid.columns != 0, axis=(2, 3)))
        return laid


class PackedPath(KernelPath):
    """Planned as `loop`, until the columns are known."""

    name = "packed"

    def refusal(self, facts: Facts) -> str | None:
        if not facts.integers:
            return (
                "takes integer cells: perfect ones, whose Gmin does not reach the ADC"
            )
        return super().refusal(facts)

    def form(self, laid: Laid, written: Written) -> Laid:
        if not fit_words(laid, written):
            raise ValueError("path='packed' has no room for this noise: leave path out")
        spans, bit_fields = certificate(laid, written, FLOAT_BITS)
        if bit_fields is None:
            raise ValueError(
                f"path='packed': sums of up to {max(spans)} levels do not fit {FLOAT_BITS} bits: leave path out"
            )
        return in_words(laid, written, bit_fields)


def fit_words(laid: Laid, written: Written) -> bool:
    """Return whether columns and variances are integers, so that words can hold them."""
    # Squares of halves, and of levels with Gmin, are not integers.
    config = written.config
    whole_squares = not config.encoding.two_sided and config.cell.on_off_ratio is None
    return laid.plan.integers and (_squares(laid) is None or whole_squares)


def certificate(
    laid: Laid, written: Written, word_bits: int
) -> tuple[list[int], BitFields | None]:
    """Return the span of every slice's sums, and bit fields of them in such words, or None if they do not fit.

    Bit fields are certified by the columns' own sums if these are known, else by the largest sums of any weights.
    """
    geometry = written.geometry
    squares = _squares(laid)
    count = len(laid.columns)
    top = geometry.converted_top

    def largest(cells: Array, power: int) -> list[int]:
        if is_traced(cells):
            levels = geometry.levels * (count // len(geometry.levels))
            return [geometry.tallest * (top * level) ** power for level in levels]
        return [
            top**power * int(slice_level)
            for slice_level in np.max(np.asarray(over_rows(cells)), axis=(1, 2))
        ]

    spans = [
        (1 + written.config.signed_inputs) * most
        for most in largest(jnp.abs(laid.columns), 1)
    ]
    return spans, certify(
        spans, word_bits, () if squares is None else largest(squares, 2)
    )


def in_words(laid: Laid, written: Written, bit_fields: BitFields) -> Laid:
    """Return the columns in words, with their variances unless these are alike for all columns."""
    squares = _squares(laid)
    signed = written.config.signed_inputs
    words = combine(
        laid.columns,
        bit_fields,
        written.geometry.converted_top,
        signed=signed,
        variances=squares,
    )
    plan = dataclasses.replace(laid.plan, bit_fields=bit_fields)
    return laid._replace(
        plan=plan, columns=words, variance=laid.variance if squares is None else None
    )


def _squares(laid: Laid) -> Columns | None:
    """Return the variances that differ from column to column, or None."""
    return (
        None if laid.variance is None or laid.variance.shape[3] == 1 else laid.variance
    )
