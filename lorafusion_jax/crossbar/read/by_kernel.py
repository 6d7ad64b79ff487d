"""Reads whose conversions are made by a kernel: the paths `loop`, `lookup`, `planes` and `packed`.

A kernel takes input codes and columns to codes [k, B, cols], summed over input slices and row tiles; what columns
stand for is recovered from these.

Axis letters: B batch, K weight slices, k conversions of a pair of slices (K, or 2 K where both polarities are
converted), R row tiles, C column tiles.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..chip.program import ArrayState
from ..config.schema import CrossbarConfig
from ..mapping import decoding as arrays
from ..mapping import encoding
from ..mapping.adc import Converter
from ..mapping.bit_fields import Packed
from .conversion_noise import Noise, deviations, of_conversions, stream
from .kernels.bit_planes import planes
from .kernels.lookup import lookup
from .kernels.loop import loop
from .kernels.packed_product import packed
from .recombine import finish, weigh

# Columns, unit columns, variances, occupied planes, flipped columns: all with row tiles as their second axis.
_Operand = tuple[Any, Array | None, Array | None, Array | None, Array | None]


def convert_tiles(
    n: Float[Array, "B d_in"], quantise: Converter, state: ArrayState, config: CrossbarConfig, key: Array | None
) -> Float[Array, "B _d_out"]:
    """Return weights times input codes; of a converter that counts, [B, 1], above zero where a conversion is clipped.

    Args:
      n: input codes.
      quantise: the ADC.
      state: of the chip.
      config: of the crossbar.
      key: of the noise.
    """
    rows, cols = encoding.grid(state.shape, config)
    tiles = encoding.split(n, rows, axis=1, front=True)
    slices = _slices(config)
    each = 2 if config.converts_each else 1
    if state.flipped is not None:  # negated columns
        quantise = quantise._replace(qmin=-quantise.qmax)

    def noise(variance: Array | None, number: Array | int, columns: Any) -> Noise | None:
        if not config.draws_at_conversion or key is None:
            return None
        words = stream(jax.random.fold_in(key, number))
        scale, of_adc = deviations(config, n.dtype), of_conversions(config, n.dtype)
        if variance is None and not isinstance(columns, Packed):  # quiet cells
            variance = jnp.zeros((*columns.shape[:3], 1), n.dtype)
        elif variance is None and columns.variances is None:
            row_tiles, read = columns.low.shape[1], columns.words.shape[2] - 1
            variance = jnp.zeros((len(columns.low), row_tiles, read, 1), n.dtype)
        return Noise(variance, jnp.tile(scale, each), words, None if of_adc is None else jnp.tile(of_adc, each))

    def unit_sums(
        tiles: Array, units: Array, variance: Array | None, number: Array | int, adc: Converter
    ) -> Float[Array, "K R B C"]:
        """Return what the unit column of every array measures, in codes."""

        def of_tile(tile: tuple[Array, Array, Array | None, Array]) -> Array:
            x, units, variance, r = tile
            variance = None if variance is None else variance[:, None]
            units = units[:, None]
            return loop(x[:, None], units, adc, slices, None, noise(variance, 2 * (number + r) + 1, units))

        by_tile = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (tiles, units, variance))
        return jnp.moveaxis(jax.lax.map(of_tile, (*by_tile, jnp.arange(tiles.shape[1]))), 0, 1)

    def of_tiles(
        tiles: Array, operand: _Operand, number: Array | int, scale: Float[Array, "1 K"]
    ) -> Float[Array, "B d_out"]:
        columns, units, variance, occupied, flipped = operand
        own = quantise._replace(scale=scale)
        adc = own._replace(scale=jnp.tile(scale[0], each))
        of_units = variance
        if units is not None and variance is not None and variance.shape[3] > 1:
            variance, of_units = variance[..., : state.shape[1]], variance[..., state.shape[1] :]
        drawn = noise(variance, 2 * number, columns)
        total = _by_kernel(tiles, columns, occupied, adc, slices, drawn, state, config)
        if adc.counts:
            clipped = jnp.sum(total, axis=(0, 2))
            if units is not None:
                clipped += jnp.sum(unit_sums(tiles, units, of_units, number, adc), axis=(0, 1, 3))
            return clipped[:, None]
        if each == 2:
            total = total[: len(total) // 2] - total[len(total) // 2 :]
        whole = encoding.split(total[..., : state.shape[1]], cols, axis=2)
        if units is not None and flipped is not None:
            lsb = own.lsb[0, :, None, None, None]
            measured = unit_sums(tiles, units, of_units, number, adc) * lsb
            return weigh(arrays.recover_flipped(whole * lsb, measured, flipped, config), None, state, config)
        if config.encoding.unit_column:
            whole = jnp.concatenate([whole, total[..., state.shape[1] :, None]], axis=3)
        ones = jnp.sum(tiles, axis=(1, 2))[:, None, None]
        return finish(whole, ones, own, state, config)

    operand = state.columns, state.units, state.variance, state.occupied, state.flipped
    worth = jnp.ones((1, 1), n.dtype) if quantise.counts else state.scale
    if state.scale.shape[0] == 1 and quantise.scale.shape[0] == 1:
        return of_tiles(tiles, operand, 0, quantise.scale) * worth

    # Row tiles whose weights, or ADCs, have ranges of their own are added up as outputs.
    axes = (3 if state.plan.path == "planes" else 1, 1, 1, 1, 1)

    def add(y: Array, tile: tuple[Array, Any, Array, Array, Array]) -> tuple[Array, None]:
        x, operand, adc_scale, scale, number = tile
        one = tuple(
            jax.tree.map(lambda a, axis=axis: jnp.expand_dims(a, axis), part)
            for part, axis in zip(operand, axes, strict=True)
        )
        return y + of_tiles(x[:, None], one, number, adc_scale[None]) * scale[None], None

    zero = jnp.zeros((n.shape[0], 1 if quantise.counts else state.shape[1]), n.dtype)
    by_tile = tuple(
        jax.tree.map(lambda a, axis=axis: jnp.moveaxis(a, axis, 0), part)
        for part, axis in zip(operand, axes, strict=True)
    )
    adc_scale, scale = (jnp.broadcast_to(a, (len(rows), a.shape[1])) for a in (quantise.scale, worth))
    return jax.lax.scan(add, zero, (jnp.moveaxis(tiles, 1, 0), by_tile, adc_scale, scale, jnp.arange(len(rows))))[0]


def _by_kernel(
    tiles: Float[Array, "B R rows"],
    columns: Any,
    occupied: Array | None,
    adc: Converter,
    slices: tuple[int, ...] | None,
    noise: Noise | None,
    state: ArrayState,
    config: CrossbarConfig,
) -> Float[Array, "k B _cols"]:
    path, packing, signed = state.plan.path, state.plan.packing, config.signed_inputs
    if slices is None or path == "loop":
        return loop(tiles, columns, adc, slices, occupied, noise)
    if path == "lookup":
        return lookup(tiles, columns, packing, adc, slices, signed=signed, noise=noise)
    if path == "planes":
        return planes(tiles, columns, adc, slices, signed=signed)
    assert packing is not None
    return packed(tiles, columns, packing, adc, slices, noise)


def _slices(config: CrossbarConfig) -> tuple[int, ...] | None:
    """Return the bits of every input slice that is converted; None for an ideal DAC."""
    if config.dac is None:
        return None
    return (config.dac.magnitude_bits,) if config.converts_sums else config.dac.slices
