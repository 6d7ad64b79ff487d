"""Calibration of one chip: ADC ranges from data, clipped conversions and errors, all from probing reads.

A probing read returns its result and `Statistics`, which add up over reads, batches and chips.

    chip = calibrated(chip, probe(x, chip)[1])

Axis letters: K weight slices, J input slices, R row tiles, C column tiles, k conversions (see `Chip`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..chip.chip import Chip, columns_of, over_stack, programmed_weights, reconfigured
from ..chip.plan import choose, worst_case
from ..devices.physical import is_traced, varying_as
from ..mapping import encoding
from ..mapping.adc import codes, converter, stacked_units
from ..read.definition import all_sums, with_mismatch, with_noise
from ..read.matmul import check_inputs, matmul, reading

# Resolution of the distribution of |current|: 1 / BINS of an array's largest possible current.
BINS = 4096
# Number of inputs of one read that enter the distributions, evenly spread. Results and errors use all inputs.
SAMPLES = 256
# Conversions of a weight slice from which on fewer inputs are counted, but at least some: each takes 50 ns on a CPU.
CONVERSIONS, _FEWEST = 2**20, 16
# Bins of the distribution of |x| for each power of two, from 2^-_LEAST on: their edges are 1 % apart.
_OCTAVE, _LEAST = 64, 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over conversions and outputs; two of them add up with `jax.tree.map(jnp.add, a, b)`.

    Attributes:
      histogram: [K, BINS] conversions by |column sum|, up to the worst case of the configuration.
      clipped: [K] conversions beyond the range.
      inputs: [BINS] inputs by log2 |x|, negative ones of an unsigned DAC as zeros; empty for an ideal DAC.
      clipped_inputs: inputs beyond the DAC's range.
      signal: sum of squares of x @ W.
      error: sum of squares of y - x @ W.
    """

    histogram: Float[Array, "*N K bins"]
    clipped: Float[Array, "*N K"]
    inputs: Float[Array, "*N bins"]
    clipped_inputs: Float[Array, "*N"]
    signal: Float[Array, "*N"]
    error: Float[Array, "*N"]

    @property
    def clip_share(self) -> Float[Array, "*N K"]:
        """Share of conversions that were clipped, of every weight slice."""
        return self.clipped / jnp.maximum(jnp.sum(self.histogram, axis=-1), 1)

    @property
    def clip_share_of_inputs(self) -> Float[Array, "*N"]:
        """Share of inputs that were clipped."""
        return self.clipped_inputs / jnp.maximum(jnp.sum(self.inputs, axis=-1), 1)

    @property
    def sqnr(self) -> Float[Array, "*N"]:
        """Signal to quantisation noise ratio, in dB."""
        return 10 * jnp.log10(self.signal / jnp.maximum(self.error, jnp.finfo(self.error.dtype).tiny))

    def collect(self, x: Float[Array, "*B d_in"], chip: Chip) -> Float[Array, "*B d_out"]:
        """Read `chip`, and return its converters' statistics as the gradient of these numbers, which are zeros."""
        leaves, tree = jax.tree.flatten(chip)
        return _tapped(tree, x, tuple(jax.tree.leaves(self)), leaves)


def probe(
    x: Float[Array, "*B d_in"], chip: Chip, *, weights: Float[Array, "d_in d_out"] | None = None
) -> tuple[Float[Array, "*B d_out"], Statistics]:
    """Read a chip, and return the result and its converters' statistics.

    Before calibration the result is that of an ideal ADC, with each input vector's largest |x| as the DAC's range.

    Args:
      x: inputs.
      chip: the chip to read.
      weights: reference of the error; None for the weights as programmed.

    Raises:
      ValueError: as `matmul` does.
    """
    check_inputs(x, chip)
    dtype, x, config = x.dtype, x.astype(chip.codes.dtype), chip.config
    if config.dac is not None and config.dac.scaling == "calibrated" and chip.input_limit is None:
        config = dataclasses.replace(config, dac=dataclasses.replace(config.dac, scaling="row"))
        chip = reconfigured(chip, config)
    if config.adc is not None and chip.limits is None and chip.plan.path != "product":
        ideal = dataclasses.replace(config, adc=None, device=dataclasses.replace(config.device, read_noise=None))
        path = "definition" if chip.plan.path == "definition" else "product"
        y = matmul(x, reconfigured(chip, ideal, plan=dataclasses.replace(chip.plan, path=path)))
    else:
        y = matmul(x, chip)
    batch = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    held = programmed_weights(chip) if weights is None else weights.astype(batch.dtype)
    reference = batch @ held
    signal, error = jnp.sum(jnp.square(reference)), jnp.sum(jnp.square(y.reshape(reference.shape) - reference))
    unnamed = dataclasses.replace(chip, name="", first=0)
    histogram, clipped, inputs, clipped_inputs = _met_by_converters(batch, unnamed)
    return y.astype(dtype), Statistics(histogram, clipped, inputs, clipped_inputs, signal, error)


def calibrated(chip: Chip, statistics: Statistics) -> Chip:
    """Return the chip with converter ranges that cover `quantile` of the observed inputs or conversions.

    The range of a `calibrated` DAC is set first. The sums at the ADCs depend on it, so that they need another probe.

    Ranges of the weight slices are powers of two apart, so that shift-and-add needs only shifts. Where column sums are
    integers, the step is 1, 2, 4, ... levels: the one with the least squared error on the observed sums, clipped ones
    included. A range that is wide enough for all inputs turns the read into one product. Its conversions can no longer
    be observed, so that later calibrations do not change it.

    Args:
      chip: one matrix, or a stack with leading axes like those of the statistics; unchanged unless a range of its
        configuration is `calibrated`.
      statistics: statistics of probing reads.

    Raises:
      ValueError: the statistics contain no conversion.
    """
    if chip.values and chip.codes.ndim > 2:  # swept values differ from matrix to matrix
        return over_stack(calibrated, chip.shape[:-2])(chip, statistics)
    config = chip.config
    adc, dac = config.adc, config.dac
    if dac is not None and dac.scaling == "calibrated" and chip.input_limit is None:
        return dataclasses.replace(chip, input_limit=_input_limit(statistics.inputs, dac.quantile))
    if adc is None or adc.range != "calibrated" or chip.plan.path == "product":
        return chip
    seen = jnp.cumsum(statistics.histogram, axis=-1)
    if not is_traced(seen) and not bool(jnp.all(seen[..., -1] > 0)):
        raise ValueError("calibration saw no conversion: probe the arrays with some inputs first")
    dtype = statistics.histogram.dtype
    bound = jnp.stack([jnp.asarray(b, dtype) for b in _extent(chip)])
    if chip.plan.ties is not None:
        lsb = _whole_steps(statistics.histogram, bound, codes(config)[1])
    else:
        reached = jnp.sum(seen < adc.quantile * seen[..., -1:], axis=-1) + 1
        lsb = reached.astype(dtype) / BINS * jnp.broadcast_to(bound, reached.shape) / codes(config)[1]
        base = jnp.max(lsb, axis=-1, keepdims=True)
        # 1e-3: a ratio that is a power of two up to rounding stays one.
        lsb = base * jnp.exp2(jnp.ceil(jnp.log2(lsb / base) - 1e-3))
    units = stacked_units(config, dtype)
    top = (lsb * codes(config)[1] / jnp.broadcast_to(units, lsb.shape))[..., None, :]
    limits = jnp.stack([-top if config.signed_sums else jnp.zeros_like(top), top], axis=-1)
    chip = dataclasses.replace(chip, limits=limits.astype(chip.codes.dtype))
    if is_traced(limits) or not chip.plan.integers:
        return chip
    rows = max(encoding.grid(chip.matrix_shape, config)[0])
    known = np.asarray(limits).reshape(-1, *limits.shape[-2:])
    bounds, columns = worst_case(config, rows), chip.shape[-1]
    plans = [choose(config, bounds, one[None], rows=rows, columns=columns, perfect=True) for one in known]
    if all(plan.path == "product" for plan in plans) and chip.plan.path != "definition":
        return dataclasses.replace(chip, plan=plans[0], columns=None, cells=None)
    return chip


def _input_limit(inputs: Float[Array, "*N bins"], quantile: float) -> Float[Array, "*N"]:
    """Return the upper edge of the bin that holds the `quantile` of the inputs; 1 if it is the bin of zero."""
    seen = jnp.cumsum(inputs, axis=-1)
    if not is_traced(seen) and not bool(jnp.all(seen[..., -1] > 0)):
        raise ValueError("calibration saw no input: probe the arrays with some inputs first")
    reached = jnp.sum(seen < quantile * seen[..., -1:], axis=-1) + 1
    edge = jnp.exp2(reached.astype(inputs.dtype) / _OCTAVE - _LEAST)
    return jnp.where(reached > 1, edge, jnp.ones_like(edge))


def _whole_steps(histogram: Float[Array, "*N K bins"], bound: Float[Array, " K"], top: int) -> Float[Array, "*N K"]:
    """Return the steps of 1, 2, 4, ... levels that quantise integer sums with the least squared error."""
    sums = jnp.round((jnp.arange(BINS, dtype=bound.dtype) + 0.5)[None] / BINS * bound[:, None])
    steps = 2.0 ** jnp.arange(32, dtype=bound.dtype)[:, None, None]
    read = steps * jnp.clip(jnp.round(sums[None] / steps), 0, top)
    errors = jnp.einsum("...kb,skb->...ks", histogram, jnp.square(read - sums[None]), precision="highest")
    return steps[:, 0, 0][jnp.argmin(errors, axis=-1)]


def _extent(chip: Chip) -> tuple[Array | float, ...]:
    """Return the largest |column sum| of every weight slice, Gmin included, in level units."""
    config = chip.config
    rows = max(encoding.grid(chip.matrix_shape, config)[0])
    full, levels = rows * encoding.converted_top(config), encoding.levels(config)
    # Sums of flipped columns stay below half of it, unless cells are off their targets.
    bounds = worst_case(config, rows) if chip.plan.integers else [top * full for top in levels]
    return tuple(
        bound + top * full * config.g_min / (1 - config.g_min) for bound, top in zip(bounds, levels, strict=True)
    )


# Compiled, because its loop would otherwise be compiled again at every call outside `jax.jit`.
@functools.partial(jax.jit, inline=True)
def _met_by_converters(
    x: Float[Array, "B d_in"], chip: Chip
) -> tuple[Float[Array, "K bins"], Float[Array, " K"], Float[Array, " bins"], Float[Array, ""]]:
    """Return the distribution of |column sum| of every weight slice, the number clipped, and both for inputs."""
    config, key = chip.config, chip.key
    slices = len(config.weight_slices)
    histogram, clipped = (varying_as(jnp.zeros(shape, x.dtype), x, chip) for shape in ((slices, BINS), (slices,)))
    zeros = histogram, clipped
    step = max(1, x.shape[0] // SAMPLES)
    x = x[: step * SAMPLES : step]
    n, limit = reading(x, chip)
    inputs, outside = jnp.zeros((BINS,), x.dtype), jnp.zeros((), x.dtype)
    if config.dac is not None:
        passed = jnp.abs(x) if config.dac.signed else jnp.maximum(x, 0)
        octaves = jnp.log2(jnp.maximum(passed, 2.0**-_LEAST)) + _LEAST
        at = jnp.clip(octaves * _OCTAVE, 0, BINS - 1).astype(jnp.int32)
        inputs = inputs.at[at.reshape(-1)].add(jnp.ones((), x.dtype))
        beyond = (jnp.abs(x) > limit) | ((x < 0) if not config.dac.signed else False)
        outside = jnp.sum(beyond, dtype=x.dtype)
    if config.adc is None or chip.plan.path == "product":
        return *zeros, inputs, outside
    n = n[:: max(1, math.ceil(len(n) / _counted(chip)))]
    keys = None if key is None else jax.random.split(key, len(n))
    bound = jnp.stack([jnp.asarray(b, x.dtype) for b in _extent(chip)])
    quantise = None if chip.limits is None else converter(chip.limits, config, chip.plan.ties)

    def of_one(total: tuple[Array, Array], one: tuple[Array, Array | None]) -> tuple[tuple[Array, Array], None]:
        sums, used = _sums(*one, chip)
        at = jnp.clip(jnp.abs(sums) / bound[:, None, None, None] * BINS, 0, BINS - 1).astype(jnp.int32)
        counted = jnp.broadcast_to(used, sums.shape[1:]).reshape(-1)
        histogram = jax.vmap(lambda row, bins: row.at[bins].add(counted))(total[0], at.reshape(slices, -1))
        clipped = total[1]
        if quantise is not None:
            of_sums = jnp.broadcast_to(quantise.scale.T[:, None, :, None], sums.shape)
            beyond = quantise.clips(quantise.scaled(sums, of_sums))
            clipped = clipped + jnp.sum(jnp.where(beyond, used, 0).reshape(slices, -1), axis=1)
        return (histogram, clipped), None

    return *jax.lax.scan(of_one, zeros, (n, keys))[0], inputs, outside


def _counted(chip: Chip) -> int:
    """Return how many inputs bring about `CONVERSIONS` of each weight slice, at least a few."""
    config = chip.config
    slices = 1 if config.converts_sums else len(config.input_slices)
    of_one = slices * len(encoding.grid(chip.matrix_shape, config)[0]) * chip.shape[-1]
    return max(_FEWEST, CONVERSIONS // of_one)


def _sums(
    n: Float[Array, " d_in"], key: Array | None, chip: Chip
) -> tuple[Float[Array, "K _J R S"], Float[Array, "R S"]]:
    """Return every sum at the ADCs for one input vector, and 1 for those of columns in use."""
    config = chip.config
    rows, _ = encoding.grid(chip.matrix_shape, config)
    tiles = encoding.split(n, rows, axis=0, front=True)
    worth = jnp.asarray(encoding.pulse_significance(config), n.dtype)
    if chip.cells is not None:
        sums = all_sums(tiles, chip.cells, key, config)  # [J, K, R, C, P, cols]
        if config.converts_sums:
            sums = jnp.tensordot(worth, sums, ((0,), (0,)))[None]
        sums = with_noise(with_mismatch(sums, chip), config, key)
        cols = jnp.asarray(np.any(encoding.cells_in_use(chip.matrix_shape, config), axis=2), n.dtype)  # [R, C, cols]
        if config.encoding.unit_column:
            cols = jnp.concatenate([cols, jnp.ones((*cols.shape[:2], 1), n.dtype)], axis=2)
        used = jnp.broadcast_to(cols[:, :, None], sums.shape[2:]).reshape(len(rows), -1)
        sums = sums.swapaxes(0, 1).reshape(*sums.shape[1::-1], len(rows), -1)
    else:
        sums = jnp.einsum("jri,krio->kjro", encoding.pulses(tiles, config), columns_of(chip))
        polarities = sums.reshape(-1, len(config.weight_slices), *sums.shape[1:])
        sums = jnp.concatenate(list(polarities), axis=3)
        if config.converts_sums:
            sums = jnp.tensordot(worth, sums, ((0,), (1,)))[:, None]
        used = jnp.ones(sums.shape[2:], n.dtype)
    return sums, used


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(
    tree: Any, x: Float[Array, "*B d_in"], tap: tuple[Array, ...], leaves: list[Any]
) -> Float[Array, "*B d_out"]:
    """Read a chip, and return the statistics as the gradient of `tap`.

    Gradients add up over calls and are stacked by layer in scans, as statistics have to be. No other gradient is passed
    on, so that collecting needs no further products.

    Args:
      tree: structure of the chip.
      x: inputs.
      tap: the fields of the statistics.
      leaves: leaves of the chip. (JAX would rebuild a dataclass with placeholders.)
    """
    return probe(x, jax.tree.unflatten(tree, leaves))[0]


def _tapped_forward(tree, x, tap, leaves):
    y, statistics = probe(x, jax.tree.unflatten(tree, leaves))
    return y, (tuple(jax.tree.leaves(statistics)), x)


def _tapped_backward(tree, residuals, cotangent):
    statistics, x = residuals
    return jnp.zeros_like(x), statistics, None


_tapped.defvjp(_tapped_forward, _tapped_backward)
