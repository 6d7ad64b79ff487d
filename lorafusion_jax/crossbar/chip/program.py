"""One chip: a matrix written into arrays, once, to be read many times.

Axis letters: K weight slices, P polarities, R row tiles, C column tiles; k conversions of a pair of input slice and
column (K, or 2 K where both polarities are converted).
"""

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from ..config.schema import CrossbarConfig, check_limits
from ..config.structure import Structure, check_same, structure_of_arrays
from ..devices.device import Device, realise
from ..devices.drift import drift_compensation
from ..devices.normal_draws import normal
from ..devices.physical import is_traced, like
from ..mapping import decoding as arrays
from ..mapping import encoding
from ..mapping.adc import codes as adc_codes
from ..mapping.adc import fixed_limits, stacked_units
from ..mapping.bit_fields import Packed
from ..read.conversion_noise import powers
from ..read.kernels.bit_planes import pair_planes, to_planes
from .pack_columns import pack_columns, pack_pairs
from .plan import Path, Plan, choose, worst_case

# Purposes of a chip's key besides those of `device.realise`.
_GAIN, _OFFSET = 16, 17
# Largest measured conductance that is taken for a fraction of Gmax: programming overshoots, but not by that much.
_MOST = 1.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayState:
    """The arrays that hold one matrix, or one for each entry of leading axes.

    Attributes:
      codes: [d_in, d_out] the weights as programmed, in weight codes: what all slices of a perfect read add up to.
      scale: [1 or R, 1 or d_out] the weight that one code stands for.
      cells: every cell in level units, a unit column last; None where no path reads single cells.
      columns: [k, R, rows, d_out + units] what multiplies the inputs, for the paths that read it; integers
        packed, or as bit planes.
      units: [K, R, rows, C] the unit columns, where they recover flipped ones; else they are among `columns`.
      variance: of read noise at sigma = 1: of `columns`, or [d_in, d_out + units] of `codes` where slices telescope;
        one column stands for all where they do not differ.
      occupied: [k, R] which planes of integer cells are not all zero, for the path `loop`.
      flipped: [K, R, C, cols] columns that are stored inverted.
      gain: [K, P, R, C, cols] the gain of each column's conversion, or None; P is 1 where polarities are subtracted
        before it.
      offset: [K, P, R, C, cols] its offset in level units, or None.
      limits: [1 or R, K, 2] ADC range of each weight slice, in units of current; R where row tiles of unequal height
        have ranges of their own; None without an ADC or before calibration.
      input_limit: full scale of the DAC; None where each input vector has its own, or before calibration.
      pulses: mean write-verify pulses per cell, or None.
      shape: (d_in, d_out).
      plan: how a read is computed, and why.
      structure: of the configuration that they were programmed with.
    """

    codes: Float[Array, "*N d_in d_out"]
    scale: Float[Array, "*N _R _cols"]
    cells: Float[Array, "*N K P R C rows cols"] | None
    columns: Float[Array, "*N k R rows _cols"] | Packed | UInt32[Array, "*N k I 2 R Q _cols"] | None
    units: Float[Array, "*N K R rows C"] | None
    variance: Float[Array, "*N _rows _cols"] | Float[Array, "*N k R rows _cols"] | None
    occupied: Bool[Array, "*N k R"] | None
    flipped: Bool[Array, "*N K R C _cols"] | None
    gain: Float[Array, "*N K _P R C cols"] | None
    offset: Float[Array, "*N K _P R C cols"] | None
    limits: Float[Array, "*N _R K 2"] | None
    input_limit: Float[Array, "*N"] | None
    pulses: Float[Array, "*N"] | None
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    plan: Plan = dataclasses.field(metadata={"static": True})
    structure: Structure = dataclasses.field(metadata={"static": True})


def program(
    weights: Array,
    config: CrossbarConfig,
    key: Array | None = None,
    *,
    path: Path | None = None,
    conductances: Float[Array, "K P R C rows cols"] | None = None,
) -> ArrayState:
    """Write a matrix into arrays.

    Pure: may be jitted, and vmapped over keys (chips), over stacked weights and over the config's values.
    Differentiable: the gradient of the programmed codes is passed straight through to the weights.

    Args:
      weights: [d_in, d_out] W of y = x W.
      config: of the crossbar.
      key: of the chip: the same key gives the same chip. Needed where the device or the ADC is random.
      path: how reads are computed (see `plan`); None chooses the fastest exact one.
      conductances: measured conductances (Gmax = 1) of all cells as they are when read, in place of modelled ones.

    Raises:
      ValueError: on weights that are no finite matrix, a missing key, conductances of another shape or that are not
        fractions of Gmax, drift of measured conductances, or a path that would not be exact.
    """
    _check(weights, config, key, conductances)
    if weights.dtype in (jnp.bfloat16, jnp.float16):
        weights = weights.astype(jnp.float32)
    dtype, shape = weights.dtype, (weights.shape[0], weights.shape[1])
    # Rounding has no useful gradient: weights get theirs from `_straight_through` alone.
    fixed = jax.lax.stop_gradient(weights)
    scale = encoding.full_scale(fixed, config) / encoding.code_scale(config)
    exact = encoding.weight_codes(fixed, scale, config)
    slices = encoding.digits(exact, config)
    rows, _ = encoding.grid(shape, config)

    perfect = conductances is None and _is_perfect(config)
    limits = fixed_limits(config, rows, dtype)
    bounds = worst_case(config, max(rows))
    _warn_of_clipping(config, max(rows))
    chosen = choose(config, bounds, limits, columns=shape[1], perfect=perfect, path=path)

    cells = flipped = gain = offset = pulses = None
    codes = exact
    signed = config.encoding.kind == "differential" and not config.converts_each
    # Perfect pairs of cells are read as signed digits: neither has to be written down on its own.
    quiet = config.device.read_noise is None and not config.mismatched
    paired = perfect and signed and quiet and chosen.path != "definition"
    if not paired and (not perfect or config.device.read_noise is not None or chosen.path != "product"):
        cells, flipped = encoding.to_arrays(slices, config)
    if cells is not None and not perfect:
        g_min = like(config.g_min, weights)
        top = jnp.asarray(encoding.levels(config), dtype)[:, None, None, None, None, None]
        if conductances is None:
            target, device = g_min + cells / top * (1 - g_min), config.device
            conductances, counts = realise(target, device, key, g_min=g_min)
            if counts is not None:
                used = encoding.cells_in_use(shape, config)
                pulses = jnp.mean(counts[..., : used.shape[-1]], where=used, dtype=dtype)
            if device.compensate and device.time is not None:
                fresh, _ = realise(target, dataclasses.replace(device, time=None), key, g_min=g_min)
                scale = scale * drift_compensation(fresh, conductances)
        elif conductances.shape != cells.shape:
            raise ValueError(
                f"conductances of shape {conductances.shape}: this matrix takes {cells.shape} "
                "[weight slices, polarities, row tiles, column tiles, rows, columns]"
            )
        cells = (conductances.astype(dtype) - g_min) / (1 - g_min) * top
        codes = arrays.programmed_codes(cells, flipped, shape, _as_held(config, chosen))
    if config.adc is not None and cells is not None and key is not None:
        conversions = 2 if config.converts_each else 1
        per_column = (cells.shape[0], conversions, *cells.shape[2:4], cells.shape[5])
        if config.adc.gain_error is not None:
            drawn = normal(jax.random.fold_in(key, _GAIN), per_column, dtype)
            gain = 1 + like(config.adc.gain_error, weights) * drawn
        if config.adc.offset_error is not None:
            drawn = normal(jax.random.fold_in(key, _OFFSET), per_column, dtype)
            scale_of_slices = stacked_units(config, dtype)[:, None, None, None, None]
            offset = like(config.adc.offset_error, weights) * drawn * scale_of_slices
    columns = units = variance = occupied = None
    # Squares of halves, and of levels with Gmin, are not integers.
    whole_squares = not config.encoding.two_sided and config.cell.on_off_ratio is None
    if cells is not None and config.device.read_noise is not None and chosen.path != "definition":
        variance = arrays.column_variances(powers(cells, config), shape, config, gain)
        if chosen.path == "product":
            worth = jnp.asarray(encoding.significance(config), dtype)
            if config.device.read_noise.kind == "independent":
                worth = worth * jnp.asarray(encoding.levels(config), dtype) / (1 - like(config.g_min, weights))
            variance = jnp.einsum("k,krio->rio", jnp.square(worth), variance)
            variance = encoding.join(variance, rows, 0, front=True)
    if paired and chosen.integers and chosen.path not in ("product", "planes"):
        columns, chosen = pack_pairs(exact, rows, config, chosen, asked=path is not None)
    elif paired and chosen.path == "planes":
        columns = pair_planes(exact, rows, config.weight_slices)
    elif chosen.path not in ("definition", "product"):
        if cells is None:
            columns = encoding.split(slices, rows, 1, front=True)
        else:
            # What cells hold reaches the gradient through the codes.
            columns = arrays.columns(jax.lax.stop_gradient(cells), shape, config, gain)
        if flipped is not None:
            columns, units = arrays.unflipped(columns, flipped, shape, config)
        if chosen.path == "planes":
            columns = to_planes(columns, max(config.weight_slices))
        elif chosen.integers and (variance is None or variance.shape[3] == 1 or (flipped is None and whole_squares)):
            columns, variance, chosen = pack_columns(columns, variance, config, chosen, asked=path is not None)
        elif chosen.path == "packed":
            raise ValueError("path='packed' has no room for this noise: leave path out")
    if chosen.path == "loop" and chosen.integers and not config.draws_at_conversion:
        occupied = jnp.any(columns != 0, axis=(2, 3))
    real = weights / encoding.per_weight(jax.lax.stop_gradient(scale), shape, config)
    return ArrayState(
        codes=_straight_through(real, codes),
        scale=scale,
        cells=jax.lax.stop_gradient(cells) if chosen.path == "definition" else None,
        columns=columns,
        units=units,
        variance=variance,
        occupied=occupied,
        flipped=flipped,
        gain=gain if chosen.path == "definition" else None,
        offset=offset,
        limits=None if limits is None else jnp.asarray(limits, dtype),
        input_limit=like(config.dac.limit, weights) if config.dac and config.dac.scaling == "fixed" else None,
        pulses=pulses,
        shape=shape,
        plan=chosen,
        structure=structure_of_arrays(config),
    )


def columns_of(state: ArrayState, config: CrossbarConfig) -> Float[Array, "k R rows cols"]:
    """Return what multiplies the inputs in the arrays: flipped columns as they are stored, unit columns last."""
    if state.plan.packing is not None or state.plan.path == "planes":  # perfect cells, which follow from the codes
        cells, _ = encoding.to_arrays(encoding.digits(state.codes, config), config)
        return arrays.columns(cells, state.shape, config)
    assert isinstance(state.columns, jax.Array)
    if state.flipped is None or state.units is None:
        return state.columns
    return arrays.as_stored(state.columns, state.units, state.flipped, state.shape, config)


def programmed_weights(state: ArrayState, config: CrossbarConfig) -> Float[Array, "d_in d_out"]:
    """Return the weights as programmed: what a read multiplies by if its converters are ideal.

    Raises:
      ValueError: the arrays were programmed with another configuration.
    """
    check_same(state.structure, config)
    return state.codes * encoding.per_weight(state.scale, state.shape, config)


@jax.custom_jvp
def _straight_through(real: Array, quantised: Array) -> Array:
    """Return `quantised`, with the derivative of `real` as well as its own."""
    return quantised


_straight_through.defjvps(lambda dot, _, *of: dot, lambda dot, _, *of: dot)


def _as_held(config: CrossbarConfig, plan: Plan) -> CrossbarConfig:
    """Return the configuration whose Gmin codes follow from, which moves where no read takes it off again."""
    ratio = config.cell.on_off_ratio
    if plan.path == "product" or not is_traced(ratio):
        return config
    return dataclasses.replace(config, cell=dataclasses.replace(config.cell, on_off_ratio=jax.lax.stop_gradient(ratio)))


def is_random(config: CrossbarConfig) -> bool:
    """Whether programming draws random numbers."""
    device = config.device
    drifts = device.drift is not None and device.time is not None
    return device.programming is not None or device.stuck is not None or drifts or config.mismatched


def _is_perfect(config: CrossbarConfig) -> bool:
    device = config.device
    return device.programming is None and device.stuck is None and (device.drift is None or device.time is None)


def _check(weights: Array, config: CrossbarConfig, key: Array | None, conductances: Array | None) -> None:
    if weights.ndim != 2 or 0 in weights.shape:
        raise ValueError(f"weights of shape {weights.shape}: give a matrix [d_in, d_out]; use jax.vmap for stacks")
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(f"weights of dtype {weights.dtype}: give floating point numbers")
    if not is_traced(weights):
        bad = int(np.sum(~np.isfinite(weights)))  # NumPy, since a constant inside jit is no value to jnp
        if bad:
            raise ValueError(f"{bad} of {weights.size} weights are NaN or infinite: no conductance stands for them")
    drawn = config if conductances is None else dataclasses.replace(config, device=Device())
    if key is None and is_random(drawn):
        raise ValueError("this crossbar is random (device or ADC errors): give the chip's key, as in jax.random.key(0)")
    if conductances is not None:
        _check_conductances(conductances, config)
    check_limits(
        None if config.adc is None else config.adc.limits, len(config.weight_slices), signed=config.signed_sums
    )


def _check_conductances(conductances: Array, config: CrossbarConfig) -> None:
    if config.device.drift is not None and config.device.time is not None:
        raise ValueError(
            f"conductances are those of cells as they are when read, but device.time = {config.device.time} asks for "
            "drift on top: set device.time=None, or let the conductances drift before (device.drift is a function)"
        )
    if is_traced(conductances):
        return
    low, high = float(np.min(conductances)), float(np.max(conductances))
    if not 0 <= low <= high <= _MOST:
        raise ValueError(
            f"conductances from {low:g} to {high:g}: give fractions of Gmax, finite and from 0 to about 1; divide "
            "microsiemens by the Gmax of the cells"
        )


def _warn_of_clipping(config: CrossbarConfig, rows: int) -> None:
    """Warn where an ADC of range `granular` clips sums of evenly spread digits and inputs at one standard deviation."""
    if config.adc is None or config.adc.range != "granular" or not config.converts_sums:
        return
    top = adc_codes(config)[1]
    usual = math.sqrt(rows) * max(encoding.levels(config)) * encoding.input_top(config) / 3
    if usual > top:
        warnings.warn(
            f"adc.range='granular' with convert='sum' covers {top:,} levels where sums of {rows} rows are usually "
            f"{usual:,.0f}, so that most conversions clip: choose range='calibrated' or 'max', or convert='slice'",
            stacklevel=3,
        )
