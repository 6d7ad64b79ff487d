"""Read paths whose conversions a kernel makes, from input codes and columns to codes summed over slices and tiles."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...chip.chip import Chip
from ...chip.columns import Laid, Written
from ...devices.physical import varying_as
from ...mapping import decoding, encoding
from ...mapping.adc.quantiser import Converter
from ...mapping.bit_fields import Packed
from ..conversion_noise import Noise, deviations, of_conversions, stream
from .path import ReadPath, products
from .sliced_products import sliced_products


class KernelPath(ReadPath):
    """A path of conversions that are products of slices."""

    needs = (products,)

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
        packing = chip.plan.packing
        slices = chip.geometry.converted_slices
        columns = columns if packing else columns.astype(tiles.dtype)
        return sliced_products(
            tiles, columns, packing, adc, slices, chip.occupied, noise
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


def slices_of(chip: Chip) -> tuple[int, ...]:
    """Return the bits of every conversion's input slice; a path whose needs exclude ideal DACs has them."""
    assert chip.geometry.converted_slices is not None
    return chip.geometry.converted_slices


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
    if variance is None and not isinstance(columns, Packed):  # quiet cells
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
