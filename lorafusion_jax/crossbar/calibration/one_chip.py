"""Calibration of one chip: ADC ranges from data, clipped conversions and errors, all from probing reads.

A probing read returns its result and `Statistics`, which add up: `calibrated(chip, probe(x, chip)[1])`.

On a prepared chip, conversions count by the square of their input vector's full scale, because a transform spreads the
massive inputs of a language model over all rows: few vectors then have the largest sums, and most of the output.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ...support.platform import is_traced
from ..chip.chip import Chip, over_stack, programmed_weights, reconfigured
from ..config.schema import tuples
from ..cost.energy import CONSTANTS, counts
from ..devices.physical import varying_as
from ..mapping import encoding
from ..mapping.adc.quantiser import converter, stacked_units
from ..read.definition import BUDGET, all_sums, input_bytes, with_mismatch, with_noise
from ..read.matmul import check_inputs, full_scale, matmul, prepared_inputs
from ..read.paths import PATHS, choose, columns_of

# Bins of |current|, from 2^-32 of the largest one on, and of |x|, from 2^-128 on; and their number for each power
# of two, so that edges are 0.5 % and 1 % apart.
BINS = 4096
_OF_SUMS = 128
_LEAST_SUM = 32
INPUT_BINS = 16384
_OF_INPUTS = 64
_LEAST_INPUT = 128
STEPS = 48  # of 1, 2, 4, ... levels that whole sums are tried with
# Number of conversions of a weight slice that each read puts into bins, at 50 ns each on a CPU, and least of an input.
CONVERSIONS = 2**20
_FEWEST = 16
_AT_ONCE = 2**21  # numbers in the sums that are computed at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over conversions and outputs; two of them add up with `jax.tree.map(jnp.add, a, b)`.

    Attributes:
      histogram: [K, BINS] conversions by log2 |column sum|, up to the largest possible one; zeros are in the first bin.
        On a prepared chip each counts as the square of its vector's full scale, and as 0 if the vector is zero, here,
        in `errors` and in `clipped`.
      errors: [K, STEPS] squared errors of integer sums that are read in steps of 1, 2, 4, ... levels.
      clipped: [K] conversions beyond the range, and `clipped_inputs` inputs beyond the DAC's.
      inputs: [INPUT_BINS] inputs by log2 |x|, negative ones of an unsigned DAC as zeros; empty for an ideal DAC.
      signal: sum of squares of x @ W, and `error` that of y - x @ W; offsets of a correction belong to x @ W.
    """

    histogram: Float[Array, "*N K bins"]
    errors: Float[Array, "*N K steps"]
    clipped: Float[Array, "*N K"]
    inputs: Float[Array, "*N input_bins"]
    clipped_inputs: Float[Array, "*N"]
    signal: Float[Array, "*N"]
    error: Float[Array, "*N"]

    @property
    def clip_share(self) -> Float[Array, "*N K"]:
        """Share of conversions that were clipped, of every weight slice."""
        conversions = jnp.sum(self.histogram, axis=-1)
        return self.clipped / jnp.where(conversions == 0, 1, conversions)

    @property
    def clip_share_of_inputs(self) -> Float[Array, "*N"]:
        """Share of inputs that were clipped."""
        return self.clipped_inputs / jnp.maximum(jnp.sum(self.inputs, axis=-1), 1)

    @property
    def read(self) -> Bool[Array, "*N"]:
        """Whether some vector was read, which an ideal DAC of a prepared chip does not count if it is zero."""
        conversions = jnp.sum(self.histogram, axis=(-2, -1))
        return conversions + jnp.sum(self.inputs, axis=-1) != 0

    @property
    def sqnr(self) -> Float[Array, "*N"]:
        """Signal to quantisation noise ratio, in dB."""
        return 10 * jnp.log10(
            self.signal / jnp.maximum(self.error, jnp.finfo(self.error.dtype).tiny)
        )


def probe(
    x: Float[Array, "*B d_in"],
    chip: Chip,
    *,
    weights: Float[Array, "d_in d_out"] | None = None,
) -> tuple[Float[Array, "*B d_out"], Statistics]:
    """Read a chip, and return the result and its converters' statistics.

    Before calibration the result is that of an ideal ADC, with each input vector's largest |x| as the DAC's range. The
    distribution of sums has about a million conversions of each weight slice, drawn at random with a fixed key where
    there are more; everything else is counted completely. The reference of the error is `weights`, by default as
    programmed.
    """
    check_inputs(x, chip)
    dtype = x.dtype
    x = x.astype(chip.codes.dtype)
    config = chip.config
    if config.dac is not None and chip.awaits_inputs:
        by_row = dataclasses.replace(config.dac, scaling="row")
        config = dataclasses.replace(config, dac=by_row)
        chip = reconfigured(chip, config)
    if (
        config.adc is not None
        and chip.limits is None
        and PATHS[chip.plan.path].converts
    ):
        ideal = dataclasses.replace(
            config, adc=None, device=dataclasses.replace(config.device, read_noise=None)
        )
        path = "definition" if PATHS[chip.plan.path].single_cells else "product"
        plan = dataclasses.replace(chip.plan, path=path)
        y = matmul(x, reconfigured(chip, ideal, plan=plan))
    else:
        y = matmul(x, chip)
    batch = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    weights_in_cells = (
        programmed_weights(chip) if weights is None else weights.astype(batch.dtype)
    )
    reference = batch @ weights_in_cells
    if (
        weights is None
        and chip.correction is not None
        and chip.correction.offset is not None
    ):
        reference = reference + chip.correction.offset.astype(batch.dtype)[None]
    signal = jnp.sum(jnp.square(reference))
    error = jnp.sum(jnp.square(y.reshape(reference.shape) - reference))
    unnamed = dataclasses.replace(chip, name="", preparation=None)
    batch = prepared_inputs(batch, chip)
    counts = jnp.ones(len(batch), batch.dtype)
    if chip.preparation is not None:
        counts = _squares_of_full_scales(batch, unnamed)
    statistics = _met_by_converters(batch, unnamed, counts)
    return y.astype(dtype), Statistics(*statistics, signal=signal, error=error)


def calibrated(chip: Chip, statistics: Statistics) -> Chip:
    """Return the chip with converter ranges that cover `quantile` of the observed inputs or sums that are not zero.

    The range of a `calibrated` DAC is set first. The sums at the ADCs depend on it, so that they need another probe.

    Ranges of the weight slices are powers of two apart. Where column sums are integers, the step is 1, 2, 4, ...
    levels: the one with the least squared error on the observed sums, clipped ones included. A range that is wide
    enough for all inputs turns the read into one product, which later calibrations do not change.

    Raises:
      ValueError: the statistics contain no conversion, or NaN.
    """
    check_numbers(chip, statistics.signal)
    if chip.values and chip.codes.ndim > 2:  # swept values differ from matrix to matrix
        return over_stack(calibrated, chip.shape[:-2])(chip, statistics)
    geometry = chip.geometry
    config = chip.config
    adc = config.adc
    if config.dac is not None and chip.awaits_inputs:
        input_limit = _input_limit(statistics.inputs, config.dac.quantile)
        return dataclasses.replace(chip, input_limit=input_limit)
    if (
        adc is None
        or geometry.code_range is None
        or adc.range != "calibrated"
        or not PATHS[chip.plan.path].converts
    ):
        return chip
    if not is_traced(statistics) and not bool(jnp.all(statistics.read)):
        raise ValueError(
            "calibration saw no conversion: probe the arrays with some inputs first"
        )
    dtype = statistics.histogram.dtype
    top = geometry.code_range[1]
    if chip.plan.ties is not None:
        lsb = jnp.exp2(
            jnp.argmin(statistics.errors[..., : _steps(chip)], axis=-1).astype(dtype)
        )
    else:
        bound = _extent(chip, dtype)
        reached = _reached(statistics.histogram, adc.quantile)
        edge = jnp.broadcast_to(bound, reached.shape) * jnp.exp2(
            reached / _OF_SUMS - _LEAST_SUM
        )
        # A slice that met only zeros gets the range of the widest.
        base = jnp.max(jnp.where(reached > 1, edge, 0), axis=-1, keepdims=True)
        base = jnp.where(base > 0, base, jnp.max(bound))
        edge = jnp.where(reached > 1, edge, base)
        # 1e-3: a ratio that is a power of two up to rounding stays one.
        lsb = base / top * jnp.exp2(jnp.ceil(jnp.log2(edge / base) - 1e-3))
    units = stacked_units(geometry, config, dtype)
    top = (lsb * top / jnp.broadcast_to(units, lsb.shape))[..., None, :]
    limits = jnp.stack(
        [-top if config.signed_sums else jnp.zeros_like(top), top], axis=-1
    )
    chip = dataclasses.replace(chip, limits=limits.astype(chip.codes.dtype))
    if is_traced(limits) or not chip.plan.integers:
        return chip
    layer_limits = np.asarray(limits).reshape(-1, *limits.shape[-2:])
    plans = [
        choose(geometry, config, limit[None], perfect=True) for limit in layer_limits
    ]
    if (
        not any(PATHS[plan.path].converts for plan in plans)
        and not PATHS[chip.plan.path].single_cells
    ):
        return dataclasses.replace(chip, plan=plans[0], columns=None, cells=None)
    return chip


def with_chosen_bits(
    chip: Chip, statistics: Statistics, tradeoff: float, *, sensitivity: float = 1.0
) -> Chip:
    """Return a calibrated chip with a table of ADC bits, one for all matrices of a stack.

    It has the least sum of the energy of the conversions for one input vector, in full conversions of one converter
    that is stopped early, and of `tradeoff` times `sensitivity` times their error power, over that of all sums.

    A conversion of a step D has an error power of 4^(shift of its slices) D^2 / 12, and one that is left out that of
    its sum.

    Raises:
      ValueError: the ADC has fewer than 8 bits, or converts sums of input slices; or the trade-off is worth no
        conversion.
    """
    geometry = chip.geometry
    config = chip.config
    adc = config.adc
    if adc is None or chip.limits is None or not PATHS[chip.plan.path].converts:
        return chip
    full = adc.full_bits
    assert geometry.code_range is not None
    if full < 8:
        raise ValueError(
            f"adc.bits = {full}: bits are chosen for a converter of 8 bits or more"
        )
    dtype = chip.codes.dtype
    bound = np.asarray(_extent(chip, dtype))[:, None]
    squares = (bound * 2 ** ((np.arange(BINS) + 0.5) / _OF_SUMS - _LEAST_SUM)) ** 2
    squares[:, 0] = 0
    histogram = np.asarray(statistics.histogram).reshape(-1, *squares.shape).sum(axis=0)
    powers = np.average(squares, axis=1, weights=histogram)[:, None]
    tops = np.asarray(chip.limits)[..., 1].reshape(-1, len(powers)).max(axis=0)
    units = np.asarray(stacked_units(geometry, config, dtype))
    steps = (tops * units / geometry.code_range[1])[:, None]
    shifts = np.outer(geometry.significance, geometry.input_significance)
    shares = shifts**2 / np.sum(shifts**2 * powers)
    fixed = CONSTANTS["adc_fixed_share"].typical
    conversions = counts(geometry.shape, config).conversions / shifts.size
    choices = np.array([0, *range(1 + config.signed_sums, full + 1)])
    costs = []
    for bits in choices:
        energy = 0.0
        errors = powers
        if bits:
            energy = fixed + (1 - fixed) * bits / full
            errors = (steps * 2.0 ** (full - bits)) ** 2 / 12
        power = tradeoff * sensitivity * shares * errors
        costs.append(conversions * energy + power)
    best = choices[np.argmin(costs, axis=0)]
    if not best.any():
        raise ValueError(
            f"tradeoff = {tradeoff:g} is worth no conversion of {chip.name or 'the chip'}: "
            "give a larger one"
        )
    table = tuples(best.tolist())
    config = dataclasses.replace(config, adc=dataclasses.replace(adc, bits=table))
    return reconfigured(chip, config, occupied=None)


def check_numbers(chip: Chip, sums: Array | np.ndarray) -> None:
    """Raise a ValueError if sums [...] over the reads of a chip are NaN; tracers pass."""
    if not is_traced(sums) and np.isnan(sums).any():
        name = chip.name or "the chip"
        raise ValueError(
            f"inputs or outputs of {name} are NaN or infinite: give batches whose activations are finite"
        )


def _squares_of_full_scales(
    x: Float[Array, "B d_in"], chip: Chip
) -> Float[Array, " B"]:
    """Return the square of each vector's full scale; 0 for vectors that drive no row."""
    passed = jnp.abs(x) if chip.config.signed_inputs else jnp.maximum(x, 0)
    scale = jnp.broadcast_to(full_scale(x, chip), (len(x), 1))[:, 0]
    return jnp.where(jnp.any(passed > 0, axis=1), jnp.square(scale), 0)


def _input_limit(
    inputs: Float[Array, "*N bins"], quantile: float
) -> Float[Array, "*N"]:
    """Return the upper edge of the bin that holds the `quantile` of the inputs that are not zero; 1 without any."""
    reached = _reached(inputs, quantile)
    if not is_traced(inputs) and not bool(jnp.all(jnp.sum(inputs, axis=-1) > 0)):
        raise ValueError(
            "calibration saw no input: probe the arrays with some inputs first"
        )
    edge = jnp.exp2(reached / _OF_INPUTS - _LEAST_INPUT)
    return jnp.where(reached > 1, edge, jnp.ones_like(edge))


def _reached(histogram: Float[Array, "*N bins"], quantile: float) -> Float[Array, "*N"]:
    """Return the number of bins up to the `quantile` of all that is not in the first one; 1 if all is in it."""
    seen = jnp.cumsum(histogram.at[..., 0].set(0), axis=-1)
    return (
        jnp.sum(seen < quantile * seen[..., -1:], axis=-1).astype(histogram.dtype) + 1
    )


def _bins(
    sizes: Float[Array, "*B"], number: int, octave: int, least: int
) -> Int[Array, "*B"]:
    """Return the bins of sizes, `octave` for each power of two from 2^-least on; the first also has smaller ones."""
    return jnp.clip(
        jnp.floor(jnp.log2(sizes) * octave) + least * octave, 0, number - 1
    ).astype(jnp.int32)


def _steps(chip: Chip) -> int:
    """Return the number of steps of 1, 2, 4, ... levels up to one that covers all possible sums."""
    assert chip.geometry.code_range is not None
    share = max(chip.geometry.bounds) / chip.geometry.code_range[1]
    return min(STEPS, 1 + max(0, math.ceil(math.log2(share))))


def _extent(chip: Chip, dtype: jnp.dtype) -> Float[Array, " K"]:
    """Return the largest |column sum| of every weight slice, Gmin included, in level units."""
    geometry = chip.geometry
    config = chip.config
    full = geometry.tallest * geometry.converted_top
    levels = geometry.levels
    # Sums of flipped columns stay below half of it, unless cells are off their targets.
    bounds = geometry.bounds if chip.plan.integers else [top * full for top in levels]
    least = jnp.asarray(config.g_min / (1 - config.g_min), dtype)
    return jnp.asarray(bounds, dtype) + jnp.asarray(levels, dtype) * full * least


# Compiled, because its loop would otherwise be compiled again at every call outside `jax.jit`.
@functools.partial(jax.jit, inline=True)
def _met_by_converters(
    x: Float[Array, "B d_in"], chip: Chip, counts: Float[Array, " B"]
) -> tuple[Array, Array, Array, Float[Array, " input_bins"], Float[Array, ""]]:
    """Return the first fields of `Statistics`; the conversions of an input vector count `counts` times."""
    config = chip.config
    limit = full_scale(x, chip)
    n = encoding.input_codes(x, limit, chip.geometry, config, chip.key)
    inputs = jnp.zeros((INPUT_BINS,), x.dtype)
    outside = jnp.zeros((), x.dtype)
    if config.dac is not None:
        passed = jnp.abs(x) if config.dac.signed else jnp.maximum(x, 0)
        at = jnp.maximum(
            _bins(passed, INPUT_BINS, _OF_INPUTS, _LEAST_INPUT),
            (passed > 0).astype(jnp.int32),
        )
        inputs = (
            jnp.zeros((INPUT_BINS,), jnp.int32)
            .at[at.reshape(-1)]
            .add(1)
            .astype(x.dtype)
        )
        beyond = (jnp.abs(x) > limit) | ((x < 0) if not config.dac.signed else False)
        outside = jnp.sum(beyond, dtype=x.dtype)
    return *_of_conversions(n, chip, counts), inputs, outside


def _of_conversions(
    n: Float[Array, "B d_in"], chip: Chip, counts: Float[Array, " B"]
) -> tuple[Float[Array, "K bins"], Float[Array, "K steps"], Float[Array, " K"]]:
    """Return the distribution of |column sum| of every weight slice, its errors in whole steps, and those clipped."""
    geometry = chip.geometry
    config = chip.config
    key = chip.key
    dtype = n.dtype
    slices = len(geometry.levels)
    none = varying_as(jnp.zeros((), dtype), n, chip)
    zeros = (
        none + jnp.zeros((slices, BINS), dtype),
        none + jnp.zeros((slices, STEPS), dtype),
        none + jnp.zeros((slices,), dtype),
    )
    if geometry.code_range is None or not PATHS[chip.plan.path].converts or len(n) == 0:
        return zeros
    columns = None
    if (
        chip.cells is None
    ):  # as [R, rows, K S], so that all sums of a row tile are one product
        columns = columns_of(chip)
        columns = columns.reshape(-1, slices, *columns.shape[1:]).transpose(
            2, 3, 1, 0, 4
        )
        columns = columns.reshape(*columns.shape[:2], -1)
    tiles = encoding.split(n, geometry.rows, axis=1, front=True)
    group_sums = functools.partial(_sums, chip=chip, columns=columns)
    size = math.prod(
        jax.eval_shape(group_sums, tiles[:1], None if key is None else key[None])[
            0
        ].shape
    )
    at_once = _AT_ONCE // size
    if chip.cells is not None:
        at_once = min(at_once, BUDGET // input_bytes(chip.cells, config))
    at_once = min(max(1, at_once), len(n))
    groups = math.ceil(len(n) / at_once)
    tiles = jnp.pad(tiles, ((0, groups * at_once - len(n)), (0, 0), (0, 0)))
    tile_counts = jnp.pad(counts, (0, len(tiles) - len(n)))
    keys = None if key is None else jax.random.split(key, (groups, at_once))
    drawing = jax.random.split(jax.random.key(0), groups)
    conversions = size // slices
    conversions_per_tile = max(_FEWEST, CONVERSIONS // len(n))
    bound = _extent(chip, dtype)
    if chip.limits is None:
        quantise = None
    else:
        quantise = converter(chip.limits, geometry, config, chip.plan.ties)
    top = geometry.code_range[1]
    steps = jnp.arange(_steps(chip) if chip.plan.ties is not None else 0)

    def add(total: tuple[Array, ...], group: tuple[Any, ...]) -> tuple[Any, None]:
        histogram, errors, clipped, seen = total
        tiles, tile_counts, keys, drawing = group
        sums, used = group_sums(tiles, keys)  # [R, _J, at_once, K, S]
        counted = (
            tile_counts[None, None, :, None, None] * used[:, None, None, None]
        )  # [R, 1, at_once, 1, S]
        sizes = jnp.abs(sums)

        def squares(step: Array) -> Float[Array, " K"]:
            levels = jnp.ldexp(jnp.ones((), dtype), step)
            inverse = jnp.ldexp(jnp.ones((), dtype), -step)
            off = jnp.minimum(jnp.round(sizes * inverse), top) * levels - sizes
            return jnp.sum(jnp.square(off) * counted, axis=(0, 1, 2, 4))

        if len(steps):
            errors = errors.at[:, : len(steps)].add(jax.lax.map(squares, steps).T)
        if quantise is not None:
            sum_scale = jnp.broadcast_to(
                quantise.scale[:, None, None, :, None], sums.shape
            )
            beyond = quantise.clips(quantise.scaled(sums, sum_scale))
            clipped = clipped + jnp.sum(
                jnp.where(beyond, counted, 0), axis=(0, 1, 2, 4)
            )
        # A sum of `counted` is now and then too large on a busy CPU (jaxlib 0.10.2).
        seen = seen + sums.shape[1] * jnp.sum(tile_counts) * jnp.sum(used)
        counted = jnp.broadcast_to(counted, (*sums.shape[:3], 1, sums.shape[4]))
        sizes = sizes.transpose(3, 2, 0, 1, 4).reshape(sizes.shape[3], at_once, -1)
        counted = counted.transpose(3, 2, 0, 1, 4).reshape(
            counted.shape[3], at_once, -1
        )
        if conversions_per_tile < conversions:
            places = jax.random.randint(
                drawing, (1, at_once, conversions_per_tile), 0, conversions
            )
            sizes = jnp.take_along_axis(sizes, places, axis=2)
            counted = jnp.take_along_axis(counted, places, axis=2)
        at = _bins(sizes / bound[:, None, None], BINS, _OF_SUMS, _LEAST_SUM).reshape(
            slices, -1
        )
        histogram = jax.vmap(lambda row, bins: row.at[bins].add(counted.reshape(-1)))(
            histogram, at
        )
        return (histogram, errors, clipped, seen), None

    parts = (
        tiles.reshape(groups, at_once, *tiles.shape[1:]),
        tile_counts.reshape(groups, at_once),
        keys,
        drawing,
    )
    (histogram, errors, clipped, seen), _ = jax.lax.scan(add, (*zeros, none), parts)
    if conversions_per_tile < conversions:
        sampled = jnp.sum(histogram[0])
        histogram = histogram * (seen / jnp.where(sampled == 0, 1, sampled))
    return histogram, errors, clipped


def _sums(
    tiles: Float[Array, "b R rows"],
    keys: Array | None,
    chip: Chip,
    columns: Float[Array, "R rows _all"] | None,
) -> tuple[Float[Array, "R _J b K S"], Float[Array, "R S"]]:
    """Return every sum at the ADCs for some input vectors, and 1 for those of columns in use."""
    geometry = chip.geometry
    config = chip.config
    dtype = tiles.dtype
    worth = jnp.asarray(geometry.input_significance, dtype)
    if (cells := chip.cells) is None:
        pulses = encoding.pulses(tiles, geometry)  # [J, b, R, rows]
        sums = jnp.einsum("jbri,rix->rjbx", pulses, columns, precision="highest")
        sums = sums.reshape(*sums.shape[:3], len(config.weight_slices), -1)
        if config.converts_sums:
            sums = jnp.einsum("j,rjbks->rbks", worth, sums, precision="highest")[
                :, None
            ]
        return sums, jnp.ones((sums.shape[0], sums.shape[4]), dtype)

    def of_one(codes: Array, key: Array | None) -> Array:
        sums = all_sums(codes, cells, key, geometry, config)  # [J, K, R, C, P, cols]
        if config.converts_sums:
            sums = jnp.tensordot(worth, sums, ((0,), (0,)))[None]
        return with_noise(with_mismatch(sums, chip), geometry, config, key)

    sums = jax.vmap(of_one)(tiles, keys).transpose(3, 1, 0, 2, 4, 5, 6)
    cols = jnp.asarray(np.any(geometry.cells_in_use, axis=2), dtype)  # [R, C, cols]
    if config.encoding.unit_column:
        cols = jnp.concatenate([cols, jnp.ones((*cols.shape[:2], 1), dtype)], axis=2)
    used = jnp.broadcast_to(cols[:, :, None], (cols.shape[0], *sums.shape[4:]))
    return sums.reshape(*sums.shape[:4], -1), used.reshape(len(used), -1)
