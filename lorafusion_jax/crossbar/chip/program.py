"""Programming: a matrix is written into arrays once and read many times.

The stages are the weight codes, the plan of a read, the cells with the device's errors, and the columns in the form
that the path needs.
"""

import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ...support.platform import is_traced
from ..config.schema import CrossbarConfig
from ..config.structure import split_config
from ..devices.device import Device, depends_on_time, realise
from ..devices.drift import drift_compensation
from ..devices.normal_draws import normal
from ..devices.physical import NUMBER, like
from ..mapping import decoding, encoding
from ..mapping.adc.quantiser import fixed_limits, stacked_units
from ..mapping.geometry import Cells, Codes, Gains, Geometry
from ..preparation.preparation import Preparation, check_preparation
from ..read.paths import PATHS, choose
from .chip import Chip
from .plan import ProgrammedCells

# purposes of a chip's key in addition to those of `device.realise`
_GAIN = 16
_OFFSET = 17
_SLICE = 32  # of residual writing, and the numbers of further slices
_MOST = 1.5  # largest measured conductance that is accepted, as a fraction of Gmax: programming can overshoot


def program(
    weights: Array,
    config: CrossbarConfig,
    key: Array | None = None,
    *,
    path: str | None = None,
    conductances: Cells | None = None,
    preparation: Preparation | None = None,
) -> Chip:
    """Write a matrix into arrays.

    The function is pure: it can be jitted, and vmapped over keys (chips), over stacked weights and over the config's
    values. It is differentiable: the gradient of the programmed codes is passed straight through to the weights.

    Args:
      weights: [d_in, d_out] W of y = x W.
      key: PRNG key of the chip: the same key gives the same chip. Needed if the device or the ADC is random.
      path: path of the reads (docs/concepts/reads.md lists them); None chooses the fastest exact one.
      conductances: measured conductances (Gmax = 1) of all cells at the time of the read, which replace modelled ones.
      preparation: change of the matrix and its inputs (see `prepare`), which some settings of `config.mapping` need.

    Raises:
      ValueError: the weights are not a finite matrix, a key is missing, conductances have another shape or are not
        fractions of Gmax, measured conductances are to drift, or the path would not be exact.
    """
    _check(weights, config, key, conductances)
    check_preparation(preparation, weights.shape, config)
    if jnp.finfo(weights.dtype).bits < 32:
        weights = weights.astype(jnp.float32)
    geometry = Geometry.of(weights.shape, config)
    ranges = None
    if preparation is not None:
        weights = preparation.weights(weights)
        ranges = preparation.ranges
    # Rounding has no useful gradient: weights get theirs only from `_straight_through`.
    fixed = jax.lax.stop_gradient(weights)
    scale = encoding.full_scale(fixed, geometry, config, ranges) / geometry.code_scale
    codes = encoding.weight_codes(fixed, scale, geometry, config)

    perfect = conductances is None and not has_errors(config)
    limits = fixed_limits(geometry, config, weights.dtype)
    _warn_of_clipping(geometry, config)
    plan = choose(geometry, config, limits, perfect=perfect, path=path)
    route = PATHS[plan.path]

    # Perfect pairs of cells are read as signed digits, so that the two cells are not stored separately.
    signed = config.encoding.kind == "differential" and not config.converts_each
    noisy = config.device.read_noise is not None
    paired = (
        perfect
        and signed
        and not noisy
        and not config.mismatched
        and not route.single_cells
    )
    slices = encoding.digits(codes, geometry, config)
    cells = None
    flipped = None
    pulses = None
    clipped = None
    if not paired and (not perfect or noisy or route.converts):
        cells, flipped = encoding.to_arrays(slices, geometry, config)
    if not perfect:
        assert cells is not None
        if config.cell.residual and conductances is None:
            written = _write_residual(codes, geometry, config, key)
        else:
            tops = encoding.per_slice(geometry.levels, cells)
            if conductances is None:
                written, _ = _realised(cells, tops, geometry, config, key)
            elif conductances.shape == cells.shape:
                measured = conductances.astype(cells.dtype)
                written = _Cells(_levels(measured, tops, config))
            else:
                raise ValueError(
                    f"conductances of shape {conductances.shape}: expected {cells.shape} "
                    "[weight slices, polarities, row tiles, column tiles, rows, columns]"
                )
        cells, fresh, pulses, clipped = written
        pulses = None if pulses is None else jnp.mean(pulses)
        ratio = config.cell.on_off_ratio
        mapped_config = config
        if route.converts and is_traced(
            ratio
        ):  # such reads remove Gmin, so codes get no gradient of it
            cell = dataclasses.replace(
                config.cell, on_off_ratio=jax.lax.stop_gradient(ratio)
            )
            mapped_config = dataclasses.replace(config, cell=cell)
        codes = decoding.programmed_codes(cells, flipped, geometry, mapped_config)
        if fresh is not None:
            per_weight = encoding.per_weight(scale, geometry)
            before = decoding.programmed_codes(fresh, flipped, geometry, mapped_config)
            scale = scale * drift_compensation(before * per_weight, codes * per_weight)
    gain, offset = _mismatch(cells, geometry, config, key)
    laid = route.lay_out(ProgrammedCells(plan, cells, slices, gain, geometry, config))
    real = weights / encoding.per_weight(jax.lax.stop_gradient(scale), geometry)
    structure, values = split_config(config)
    return Chip(
        codes=_straight_through(real, codes),
        scale=scale,
        cells=jax.lax.stop_gradient(cells) if route.single_cells else None,
        flipped=flipped,
        gain=gain if route.single_cells else None,
        offset=offset,
        limits=None if limits is None else jnp.asarray(limits, weights.dtype),
        input_limit=like(config.dac.limit, weights)
        if config.dac and config.dac.scaling == "fixed"
        else None,
        pulses=pulses,
        clipped=clipped,
        preparation=preparation,
        values=values,
        structure=structure,
        geometry=geometry,
        **laid._asdict(),
    )


class _Cells(NamedTuple):
    """Cells at the time of the read, fresh ones to compensate drift, pulses, and the share that residuals clip."""

    cells: Cells
    fresh: Cells | None = None
    pulses: Array | None = None
    clipped: Array | None = None


def _write_residual(
    codes: Codes, geometry: Geometry, config: CrossbarConfig, key: Array | None
) -> _Cells:
    """Return cells whose slices, from the most significant one on, store what is left of the codes.

    Song et al., Science 383, 903 (2024). Digits are the nearest ones to what remains after each slice was read back.
    """
    remaining = encoding.in_tiles(codes, geometry)
    used = geometry.cells_in_use
    beyond = jnp.zeros(remaining.shape, bool)
    slices = []
    room = sum(
        worth * top
        for worth, top in zip(geometry.significance, geometry.levels, strict=True)
    )
    step = geometry.significance[0] if config.cell.bits is not None else 0.0
    for number in reversed(range(len(geometry.levels))):
        worth = geometry.significance[number]
        top = jnp.asarray(geometry.levels[number], codes.dtype)
        beyond = beyond | (jnp.abs(remaining) > room + step / 2)
        room = room - worth * geometry.levels[number]
        digits = remaining / worth
        if config.cell.bits is not None:
            digits = jnp.round(digits)
        targets = encoding.polarities(jnp.clip(digits, -top, top)[None], top, config)
        slice_key = None if key is None else jax.random.fold_in(key, _SLICE + number)
        cells, read = _realised(targets, top, geometry, config, slice_key)
        remaining = remaining - worth * (read[0, 0] - read[0, 1])
        slices.insert(0, cells)
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *slices)
    return together._replace(clipped=jnp.mean(beyond, where=used, dtype=codes.dtype))


def _realised(
    targets: Cells, top: Array, geometry: Geometry, config: CrossbarConfig, key: Any
) -> tuple[_Cells, Cells]:
    """Return the cells of targets in level units, with mean pulses [1], and what reading them back returns."""
    device = config.device
    g_min = like(config.g_min, targets)
    conductance_targets = g_min + targets / top * (1 - g_min)
    written = realise(conductance_targets, device, key, g_min=g_min)
    pulses = None
    used = geometry.cells_in_use
    if written.pulses is not None:
        counts = written.pulses[..., : used.shape[-1]]
        pulses = jnp.mean(counts, where=used, dtype=targets.dtype)[None]
    fresh = None
    if device.compensate and device.time is not None:
        young = dataclasses.replace(device, time=None)
        rewritten = realise(conductance_targets, young, key, g_min=g_min)
        fresh = _levels(rewritten.conductances, top, config)
    cells = _Cells(_levels(written.conductances, top, config), fresh, pulses)
    return cells, _levels(written.read, top, config)


def _levels(conductances: Array, top: Array, config: CrossbarConfig) -> Array:
    """Return conductances in level units."""
    g_min = like(config.g_min, conductances)
    return (conductances - g_min) / (1 - g_min) * top


def _mismatch(
    cells: Cells | None, geometry: Geometry, config: CrossbarConfig, key: Array | None
) -> tuple[Gains | None, Gains | None]:
    """Return the gain and the offset of each column's ADC, or None without such errors."""
    if config.adc is None or cells is None or key is None:
        return None, None
    per_column = (
        cells.shape[0],
        2 if config.converts_each else 1,
        *cells.shape[2:4],
        cells.shape[5],
    )

    def drawn(deviation: Any, purpose: int) -> Array | None:
        if deviation is None:
            return None
        return like(deviation, cells) * normal(
            jax.random.fold_in(key, purpose), per_column, cells.dtype
        )

    gain = drawn(config.adc.gain_error, _GAIN)
    offset = drawn(config.adc.offset_error, _OFFSET)
    units = stacked_units(geometry, config, cells.dtype)[:, None, None, None, None]
    return (
        None if gain is None else 1 + gain,
        None if offset is None else offset * units,
    )


# Both arguments have their derivatives; the value is that of the second.
_straight_through = jax.custom_jvp(lambda real, quantised: quantised)
_straight_through.defjvps(lambda dot, _, *of: dot, lambda dot, _, *of: dot)


def is_random(config: CrossbarConfig) -> bool:
    """Return whether programming draws random numbers."""
    return has_errors(config) or config.mismatched


def has_errors(config: CrossbarConfig) -> bool:
    """Return whether cells differ from their targets when they are read."""
    device = config.device
    drifts = device.drift is not None and device.time is not None
    return device.programming is not None or device.stuck is not None or drifts


def _check(
    weights: Array,
    config: CrossbarConfig,
    key: Array | None,
    conductances: Array | None,
) -> None:
    if weights.ndim != 2 or 0 in weights.shape:
        raise ValueError(
            f"weights of shape {weights.shape}: give a matrix [d_in, d_out]; use jax.vmap for stacks"
        )
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"weights of dtype {weights.dtype}: give floating point numbers"
        )
    if not is_traced(weights):
        # NumPy, because jnp would trace a constant inside jit
        if bad := int(np.sum(~np.isfinite(weights))):
            raise ValueError(
                f"{bad} of {weights.size} weights are NaN or infinite: give finite weights"
            )
    config_to_draw = (
        config if conductances is None else dataclasses.replace(config, device=Device())
    )
    if key is None and is_random(config_to_draw):
        raise ValueError(
            "this crossbar is random (device or ADC errors): give the chip's key, as in jax.random.key(0)"
        )
    time = config_to_draw.device.time
    if (
        isinstance(time, NUMBER)
        and time > 0
        and not depends_on_time(config_to_draw.device)
    ):
        raise ValueError(
            f"device.time = {time} changes nothing without device.drift: give one, such as PowerLaw(0.05)"
        )
    if conductances is None:
        return
    if config.device.drift is not None and config.device.time is not None:
        raise ValueError(
            f"conductances are those of cells at the time of a read, but device.time = {config.device.time} would add "
            "drift: set device.time=None, or let the conductances drift before (device.drift is a function)"
        )
    if is_traced(conductances):
        return
    low = float(np.min(conductances))
    high = float(np.max(conductances))
    if not 0 <= low <= high <= _MOST:
        raise ValueError(
            f"conductances from {low:g} to {high:g}: give fractions of Gmax, finite and from 0 to about 1; divide "
            "microsiemens by the Gmax of the cells"
        )


def _warn_of_clipping(geometry: Geometry, config: CrossbarConfig) -> None:
    """Warn if an ADC of range `granular` clips sums of evenly spread digits and inputs at one standard deviation."""
    if (
        geometry.code_range is None
        or config.adc is None
        or config.adc.range != "granular"
        or not config.converts_sums
    ):
        return
    rows = geometry.tallest
    top = geometry.code_range[1]
    usual = math.sqrt(rows) * max(geometry.levels) * geometry.input_top / 3
    if usual > top:
        warnings.warn(
            f"adc.range='granular' with convert='sum' covers {top:,} levels where sums of {rows} rows are usually "
            f"{usual:,.0f}, so that most conversions clip: choose range='calibrated' or 'max', or convert='slice'",
            stacklevel=3,
        )
