"""Reads whose conversions a kernel makes, from input codes and columns to codes summed over slices and row tiles."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..chip.chip import Chip, columns_of
from ..devices.physical import varying_as
from ..mapping import encoding
from ..mapping.adc.quantiser import Converter
from ..mapping.bit_fields import Packed
from ..mapping.decoding import finish, recover_flipped, weigh
from .conversion_noise import Noise, deviations, of_conversions, stream
from .kernels.bit_planes import planes
from .kernels.lookup import lookup
from .kernels.sliced_products import sliced_products
from .kernels.tables import tables

# Vectors from which a whole model's arrays are read from tables.
_MANY = 64


def convert_tiles(n: Float[Array, "B d_in"], quantise: Converter, chip: Chip) -> Float[Array, "B d_out"]:
    """Return weights times input codes."""
    rows = chip.geometry.rows
    if chip.plan.tabulates and len(n) >= _MANY:
        plan = dataclasses.replace(chip.plan, path="tables", packing=None)
        chip = dataclasses.replace(chip, columns=columns_of(chip), occupied=None, plan=plan)
    tiles = encoding.split(n, rows, axis=1, front=True)
    if chip.flipped is not None:  # negated columns
        quantise = quantise._replace(qmin=-quantise.qmax)
    if chip.scale.shape[0] == 1 and quantise.scale.shape[0] == 1:
        return _of_tiles(tiles, 0, quantise, chip) * chip.scale

    # Row tiles whose weights, or ADCs, have separate ranges are added up as outputs.
    axes = {"columns": 3 if chip.plan.path == "planes" else 1, "units": 1, "variance": 1, "occupied": 1, "flipped": 1}

    def along(move: Callable[[Array, int], Array], parts: dict[str, Any]) -> dict[str, Any]:
        return {name: jax.tree.map(lambda a, axis=axes[name]: move(a, axis), part) for name, part in parts.items()}

    def add(y: Array, tile: tuple[Array, dict[str, Any], Array, Array, Array]) -> tuple[Array, None]:
        x, parts, adc_scale, scale, number = tile
        own = dataclasses.replace(chip, **along(jnp.expand_dims, parts))
        return y + _of_tiles(x[:, None], number, quantise._replace(scale=adc_scale[None]), own) * scale[None], None

    zero = varying_as(jnp.zeros((n.shape[0], chip.shape[1]), n.dtype), n, chip)
    by_tile = along(lambda a, axis: jnp.moveaxis(a, axis, 0), {name: getattr(chip, name) for name in axes})
    adc_scale, scale = (jnp.broadcast_to(a, (len(rows), a.shape[1])) for a in (quantise.scale, chip.scale))
    return jax.lax.scan(add, zero, (jnp.moveaxis(tiles, 1, 0), by_tile, adc_scale, scale, jnp.arange(len(rows))))[0]


def _of_tiles(
    tiles: Float[Array, "B R rows"], number: Array | int, quantise: Converter, chip: Chip
) -> Float[Array, "B d_out"]:
    """Return the product of row tiles of one scale, which begin with this number."""
    geometry, config, d_out = chip.geometry, chip.config, chip.shape[1]
    each, units, variance = 2 if config.converts_each else 1, chip.units, chip.variance
    adc = quantise._replace(scale=jnp.tile(quantise.scale[0], each))
    of_units = variance
    if units is not None and variance is not None and variance.shape[3] > 1:
        variance, of_units = variance[..., :d_out], variance[..., d_out:]
    total = _codes(tiles, adc, _noise(variance, 2 * number, chip.columns, chip, tiles.dtype), chip)
    if each == 2:
        total = total[: len(total) // 2] - total[len(total) // 2 :]
    whole = encoding.split(total[..., :d_out], geometry.cols, axis=2)
    if units is not None and chip.flipped is not None:
        lsb = quantise.lsb[0, :, None, None, None]
        measured = _unit_sums(tiles, units, of_units, number, adc, chip) * lsb
        return weigh(recover_flipped(whole * lsb, measured, chip.flipped, geometry, config), None, geometry)
    if config.encoding.unit_column:
        whole = jnp.concatenate([whole, total[..., d_out:, None]], axis=3)
    ones = jnp.sum(tiles, axis=(1, 2))[:, None, None]
    return finish(whole, ones, quantise, None, geometry, config)


def _codes(
    tiles: Float[Array, "B R rows"], adc: Converter, noise: Noise | None, chip: Chip
) -> Float[Array, "k B _cols"]:
    """Return the codes of all conversions, shifted and added over input slices and row tiles."""
    plan, slices, signed = chip.plan, chip.geometry.converted_slices, chip.config.signed_inputs
    columns: Any = chip.columns  # in the form that the plan's path needs
    if slices is not None and plan.path == "lookup":
        return lookup(tiles, columns, plan.packing, adc, slices, signed=signed, noise=noise)
    if slices is not None and plan.path == "tables":
        levels, rows = chip.geometry.levels, chip.geometry.rows
        of_columns = levels * (len(columns) // len(levels)) if plan.integers else None
        unused = max(rows) - rows[-1] if tiles.shape[1] == len(rows) else 0
        return tables(tiles, columns, of_columns, adc, slices, unused, signed=signed)
    if slices is not None and plan.path == "planes":
        return planes(tiles, columns, adc, slices, signed=signed)
    # Not for gradients, which need the ADC without rounding, and kernels have none; and no TPU has float64.
    if slices is not None and plan.path == "mosaic" and adc.rounds and tiles.dtype == jnp.float32:
        from .kernels.mosaic import mosaic  # here, since Pallas takes a quarter of a second to load

        return mosaic(tiles, columns, adc, slices, signed=signed)
    columns = columns if plan.packing else columns.astype(tiles.dtype)
    return sliced_products(tiles, columns, plan.packing, adc, slices, chip.occupied, noise)


def _unit_sums(
    tiles: Float[Array, "B R rows"],
    units: Float[Array, "K R rows C"],
    variance: Float[Array, "K R rows _cols"] | None,
    number: Array | int,
    adc: Converter,
    chip: Chip,
) -> Float[Array, "K R B C"]:
    """Return the measurement of every array's unit column, in codes."""
    slices = chip.geometry.converted_slices

    def of_tile(tile: tuple[Array, Array, Array | None, Array]) -> Array:
        x, units, variance, r = tile
        variance = None if variance is None else variance[:, None]
        units = units[:, None]
        noise = _noise(variance, 2 * (number + r) + 1, units, chip, x.dtype)
        return sliced_products(x[:, None], units, None, adc, slices, None, noise)

    by_tile = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (tiles, units, variance))
    return jnp.moveaxis(jax.lax.map(of_tile, (*by_tile, jnp.arange(tiles.shape[1]))), 0, 1)


def _noise(variance: Array | None, number: Array | int, columns: Any, chip: Chip, dtype: jnp.dtype) -> Noise | None:
    """Return the noise of columns, whose stream has this number."""
    geometry, config = chip.geometry, chip.config
    if not config.draws_at_conversion or chip.key is None:
        return None
    each = 2 if config.converts_each else 1
    words = stream(jax.random.fold_in(chip.key, number))
    scale, of_adc = deviations(geometry, config, dtype), of_conversions(geometry, config, dtype)
    if variance is None and not isinstance(columns, Packed):  # quiet cells
        variance = jnp.zeros((*columns.shape[:3], 1), dtype)
    elif variance is None and columns.variances is None:
        row_tiles, read = columns.low.shape[1], columns.words.shape[2] - 1
        variance = jnp.zeros((len(columns.low), row_tiles, read, 1), dtype)
    return Noise(variance, jnp.tile(scale, each), words, None if of_adc is None else jnp.tile(of_adc, each))
