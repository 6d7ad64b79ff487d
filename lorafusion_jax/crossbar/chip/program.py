"""Programming: a matrix is written into arrays once and read many times.

The stages are the weight codes, the plan of a read, the cells with the device's errors, and the columns in the form
that the path needs.

Axis letters: K weight slices, P polarities, R row tiles, C column tiles.
"""

import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int8

from ..config.schema import CrossbarConfig, check_limits
from ..config.structure import split_config
from ..devices.device import Device, depends_on_time, realise
from ..devices.drift import drift_compensation
from ..devices.normal_draws import normal
from ..devices.physical import NUMBER, is_traced, like
from ..mapping import decoding, encoding
from ..mapping.adc.quantiser import fixed_limits, stacked_units
from ..mapping.geometry import Geometry
from ..read.conversion_noise import powers
from ..read.kernels.bit_planes import pair_planes, to_planes
from .chip import Chip
from .pack_columns import pack_columns, pack_pairs
from .plan import Path, Plan, choose

# Purposes of a chip's key in addition to those of `device.realise`.
_GAIN, _OFFSET = 16, 17
# Largest measured conductance that is accepted as a fraction of Gmax. Programming can overshoot, but not beyond this.
_MOST = 1.5


class _Written(NamedTuple):
    """The cells of a chip.

    Attributes:
      codes: [d_in, d_out] the weight codes of the cells.
      scale: the weight of one code, with compensation of drift if the device has it.
      cells: in level units; None if they are at their targets and the path does not read single cells.
      flipped: columns that are stored inverted.
      pulses: mean write-verify pulses per cell.
    """

    codes: Float[Array, "d_in d_out"]
    scale: Float[Array, "_R _cols"]
    cells: Float[Array, "K P R C rows cols"] | None
    flipped: Bool[Array, "K R C _cols"] | None
    pulses: Float[Array, ""] | None


class _Columns(NamedTuple):
    """Columns that multiply the inputs, in the form that the plan's path needs (see `Chip`)."""

    plan: Plan
    columns: Any = None
    units: Float[Array, "K R rows C"] | None = None
    variance: Float[Array, "..."] | None = None


def program(
    weights: Array,
    config: CrossbarConfig,
    key: Array | None = None,
    *,
    path: Path | None = None,
    conductances: Float[Array, "K P R C rows cols"] | None = None,
) -> Chip:
    """Write a matrix into arrays.

    The function is pure: it can be jitted, and vmapped over keys (chips), over stacked weights and over the config's
    values. It is differentiable: the gradient of the programmed codes is passed straight through to the weights.

    Args:
      weights: [d_in, d_out] W of y = x W.
      key: PRNG key of the chip: the same key gives the same chip. Needed if the device or the ADC is random.
      path: path of the reads (see `chip.plan`); None chooses the fastest exact one.
      conductances: measured conductances (Gmax = 1) of all cells at the time of the read, which replace modelled ones.

    Raises:
      ValueError: the weights are not a finite matrix, a key is missing, conductances have another shape or are not
        fractions of Gmax, measured conductances are to drift, or the path would not be exact.
    """
    _check(weights, config, key, conductances)
    if jnp.finfo(weights.dtype).bits < 32:
        weights = weights.astype(jnp.float32)
    geometry = Geometry.of(weights.shape, config)
    # Rounding has no useful gradient: weights get theirs only from `_straight_through`.
    fixed = jax.lax.stop_gradient(weights)
    scale = encoding.full_scale(fixed, geometry, config) / geometry.code_scale
    codes = encoding.weight_codes(fixed, scale, geometry, config)

    perfect = conductances is None and not _has_errors(config)
    limits = fixed_limits(geometry, config, weights.dtype)
    _warn_of_clipping(geometry, config)
    plan = choose(geometry, config, limits, perfect=perfect, path=path)

    # Perfect pairs of cells are read as signed digits, so that the two cells are not stored separately.
    signed = config.encoding.kind == "differential" and not config.converts_each
    quiet = config.device.read_noise is None and not config.mismatched
    paired = perfect and signed and quiet and plan.path != "definition"
    written = _Written(codes, scale, None, None, None)
    slices = encoding.digits(codes, geometry, config)
    if not paired and (not perfect or config.device.read_noise is not None or plan.path != "product"):
        cells, flipped = encoding.to_arrays(slices, geometry, config)
        written = written._replace(cells=cells, flipped=flipped)
    if not perfect:
        written = _write(written, geometry, config, key, conductances, plan)
    gain, offset = _mismatch(written.cells, geometry, config, key)
    if paired:
        laid = _lay_out_pairs(codes, slices, geometry, config, plan, asked=path is not None)
    else:
        laid = _lay_out(written, slices, gain, geometry, config, plan, asked=path is not None)
    occupied = None
    if laid.plan.path == "loop" and laid.plan.integers and not config.draws_at_conversion:
        occupied = jnp.any(laid.columns != 0, axis=(2, 3))
    real = weights / encoding.per_weight(jax.lax.stop_gradient(written.scale), geometry)
    by_cell = laid.plan.path == "definition"
    structure, values = split_config(config)
    return Chip(
        codes=_straight_through(real, written.codes),
        scale=written.scale,
        cells=jax.lax.stop_gradient(written.cells) if by_cell else None,
        columns=laid.columns,
        units=laid.units,
        variance=laid.variance,
        occupied=occupied,
        flipped=written.flipped,
        gain=gain if by_cell else None,
        offset=offset,
        limits=None if limits is None else jnp.asarray(limits, weights.dtype),
        input_limit=like(config.dac.limit, weights) if config.dac and config.dac.scaling == "fixed" else None,
        pulses=written.pulses,
        values=values,
        structure=structure,
        geometry=geometry,
        plan=laid.plan,
    )


def _write(
    target: _Written,
    geometry: Geometry,
    config: CrossbarConfig,
    key: Array | None,
    conductances: Array | None,
    plan: Plan,
) -> _Written:
    """Return cells at the time of the read, modelled or measured, given their targets."""
    cells, codes, scale, pulses = target.cells, target.codes, target.scale, None
    assert cells is not None
    dtype = codes.dtype
    g_min = like(config.g_min, codes)
    top = jnp.asarray(geometry.levels, dtype)[:, None, None, None, None, None]
    if conductances is None:
        wanted, device = g_min + cells / top * (1 - g_min), config.device
        conductances, counts = realise(wanted, device, key, g_min=g_min)
        used = geometry.cells_in_use
        if counts is not None:
            pulses = jnp.mean(counts[..., : used.shape[-1]], where=used, dtype=dtype)
        if device.compensate and device.time is not None:
            fresh, _ = realise(wanted, dataclasses.replace(device, time=None), key, g_min=g_min)
            # A tile that is smaller than others has cells that no input drives: they are in no current.
            scale = scale * drift_compensation(*(jnp.where(used, G, 0) for G in (fresh, conductances)))
    elif conductances.shape != cells.shape:
        raise ValueError(
            f"conductances of shape {conductances.shape}: this matrix takes {cells.shape} "
            "[weight slices, polarities, row tiles, column tiles, rows, columns]"
        )
    cells = (conductances.astype(dtype) - g_min) / (1 - g_min) * top
    codes = decoding.programmed_codes(cells, target.flipped, geometry, _as_held(config, plan))
    return target._replace(codes=codes, scale=scale, cells=cells, pulses=pulses)


def _mismatch(
    cells: Float[Array, "K P R C rows cols"] | None, geometry: Geometry, config: CrossbarConfig, key: Array | None
) -> tuple[Float[Array, "K _P R C cols"] | None, Float[Array, "K _P R C cols"] | None]:
    """Return the gain and the offset of each column's ADC, or None without such errors."""
    gain = offset = None
    if config.adc is None or cells is None or key is None:
        return gain, offset
    conversions = 2 if config.converts_each else 1
    per_column = (cells.shape[0], conversions, *cells.shape[2:4], cells.shape[5])
    if config.adc.gain_error is not None:
        drawn = normal(jax.random.fold_in(key, _GAIN), per_column, cells.dtype)
        gain = 1 + like(config.adc.gain_error, cells) * drawn
    if config.adc.offset_error is not None:
        drawn = normal(jax.random.fold_in(key, _OFFSET), per_column, cells.dtype)
        scale_of_slices = stacked_units(geometry, config, cells.dtype)[:, None, None, None, None]
        offset = like(config.adc.offset_error, cells) * drawn * scale_of_slices
    return gain, offset


def _lay_out_pairs(
    codes: Float[Array, "d_in d_out"],
    slices: Float[Array, "K d_in d_out"],
    geometry: Geometry,
    config: CrossbarConfig,
    plan: Plan,
    *,
    asked: bool,
) -> _Columns:
    """Return perfect differential weights, as signed digits."""
    if plan.path == "product":
        return _Columns(plan)
    if plan.path == "planes":
        return _Columns(plan, pair_planes(codes, geometry.rows, config.weight_slices))
    if plan.integers and plan.path != "mosaic":
        columns, plan = pack_pairs(codes, geometry, config, plan, asked=asked)
        return _Columns(plan, columns)
    return _Columns(plan, _as_bytes(encoding.split(slices, geometry.rows, 1, front=True), geometry, plan))


def _lay_out(
    written: _Written,
    slices: Float[Array, "K d_in d_out"],
    gain: Array | None,
    geometry: Geometry,
    config: CrossbarConfig,
    plan: Plan,
    *,
    asked: bool,
) -> _Columns:
    """Return columns of any cells, with the variances of their read noise."""
    cells, flipped = written.cells, written.flipped
    variance = units = None
    if cells is not None and config.device.read_noise is not None and plan.path != "definition":
        variance = decoding.column_variances(powers(cells, geometry, config), geometry, config, gain)
    if plan.path == "definition":
        return _Columns(plan)
    if plan.path == "product":
        return _Columns(plan, variance=None if variance is None else _telescoped(variance, geometry, config))
    if cells is None:
        columns = encoding.split(slices, geometry.rows, 1, front=True)
    else:
        # The cells' values reach the gradient through the codes.
        columns = decoding.columns(jax.lax.stop_gradient(cells), geometry, config, gain)
    if flipped is not None:
        columns, units = decoding.unflipped(columns, flipped, geometry)
    # Squares of halves, and of levels with Gmin, are not integers.
    whole_squares = not config.encoding.two_sided and config.cell.on_off_ratio is None
    if plan.path == "planes":
        columns = to_planes(columns, max(config.weight_slices))
    elif plan.path == "mosaic":
        columns = _as_bytes(columns, geometry, plan)
    elif plan.integers and (variance is None or variance.shape[3] == 1 or (flipped is None and whole_squares)):
        columns, variance, plan = pack_columns(columns, variance, geometry, config, plan, asked=asked)
    elif plan.path == "packed":
        raise ValueError("path='packed' has no room for this noise: leave path out")
    return _Columns(plan, columns, units, variance)


def _as_bytes(
    columns: Float[Array, "k R rows _cols"], geometry: Geometry, plan: Plan
) -> Float[Array, "k R rows _cols"] | Int8[Array, "k R rows _cols"]:
    """Return integers as bytes, which are multiplied with bytes, where both factors always fit."""
    fit = max(*geometry.levels, geometry.converted_top) < 2**7
    return columns.astype(jnp.int8) if plan.integers and fit else columns


def _telescoped(
    variance: Float[Array, "K R rows _cols"], geometry: Geometry, config: CrossbarConfig
) -> Float[Array, "_rows _cols"]:
    """Return the variances of weight codes, given those of every slice's columns."""
    worth = jnp.asarray(geometry.significance, variance.dtype)
    if config.device.read_noise is not None and config.device.read_noise.kind == "independent":
        levels = jnp.asarray(geometry.levels, variance.dtype)
        worth = worth * levels / (1 - like(config.g_min, variance))
    of_codes = jnp.einsum("k,krio->rio", jnp.square(worth), variance)
    return encoding.join(of_codes, geometry.rows, 0, front=True)


@jax.custom_jvp
def _straight_through(real: Array, quantised: Array) -> Array:
    """Return `quantised`, with the derivative of `real` in addition to its own."""
    return quantised


_straight_through.defjvps(lambda dot, _, *of: dot, lambda dot, _, *of: dot)


def _as_held(config: CrossbarConfig, plan: Plan) -> CrossbarConfig:
    """Return the configuration with the Gmin that codes depend on; it has a gradient only if reads do not remove it."""
    ratio = config.cell.on_off_ratio
    if plan.path == "product" or not is_traced(ratio):
        return config
    return dataclasses.replace(config, cell=dataclasses.replace(config.cell, on_off_ratio=jax.lax.stop_gradient(ratio)))


def is_random(config: CrossbarConfig) -> bool:
    """Return whether programming draws random numbers."""
    return _has_errors(config) or config.mismatched


def _has_errors(config: CrossbarConfig) -> bool:
    """Return whether cells differ from their targets when they are read."""
    device = config.device
    drifts = device.drift is not None and device.time is not None
    return device.programming is not None or device.stuck is not None or drifts


def _check(weights: Array, config: CrossbarConfig, key: Array | None, conductances: Array | None) -> None:
    if weights.ndim != 2 or 0 in weights.shape:
        raise ValueError(f"weights of shape {weights.shape}: give a matrix [d_in, d_out]; use jax.vmap for stacks")
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(f"weights of dtype {weights.dtype}: give floating point numbers")
    if not is_traced(weights):
        bad = int(np.sum(~np.isfinite(weights)))  # NumPy, because jnp would trace a constant inside jit
        if bad:
            raise ValueError(f"{bad} of {weights.size} weights are NaN or infinite: give finite weights")
    drawn = config if conductances is None else dataclasses.replace(config, device=Device())
    if key is None and is_random(drawn):
        raise ValueError("this crossbar is random (device or ADC errors): give the chip's key, as in jax.random.key(0)")
    time = drawn.device.time
    if isinstance(time, NUMBER) and time > 0 and not depends_on_time(drawn.device):
        raise ValueError(
            f"device.time = {time} changes nothing, because the cells do not depend on time: give device.drift too, "
            "such as PowerLaw(0.05), or leave device.time out"
        )
    if conductances is not None:
        _check_conductances(conductances, config)
    check_limits(
        None if config.adc is None else config.adc.limits, len(config.weight_slices), signed=config.signed_sums
    )


def _check_conductances(conductances: Array, config: CrossbarConfig) -> None:
    if config.device.drift is not None and config.device.time is not None:
        raise ValueError(
            f"conductances are those of cells at the time of a read, but device.time = {config.device.time} would add "
            "drift: set device.time=None, or let the conductances drift before (device.drift is a function)"
        )
    if is_traced(conductances):
        return
    low, high = float(np.min(conductances)), float(np.max(conductances))
    if not 0 <= low <= high <= _MOST:
        raise ValueError(
            f"conductances from {low:g} to {high:g}: give fractions of Gmax, finite and from 0 to about 1; divide "
            "microsiemens by the Gmax of the cells"
        )


def _warn_of_clipping(geometry: Geometry, config: CrossbarConfig) -> None:
    """Warn if an ADC of range `granular` clips sums of evenly spread digits and inputs at one standard deviation."""
    if geometry.code_range is None or config.adc is None or config.adc.range != "granular" or not config.converts_sums:
        return
    rows, top = geometry.tallest, geometry.code_range[1]
    usual = math.sqrt(rows) * max(geometry.levels) * geometry.input_top / 3
    if usual > top:
        warnings.warn(
            f"adc.range='granular' with convert='sum' covers {top:,} levels where sums of {rows} rows are usually "
            f"{usual:,.0f}, so that most conversions clip: choose range='calibrated' or 'max', or convert='slice'",
            stacklevel=3,
        )
