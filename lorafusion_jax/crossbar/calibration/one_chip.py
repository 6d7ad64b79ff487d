"""ADC ranges from data, clipped conversions and errors: what a probing read sees.

A probing read returns its result and `Statistics`, which add up over reads, batches and chips.

    state = calibrated(state, probe(x, state, config)[1], config)

Axis letters: K weight slices, J input slices, R row tiles, C column tiles, k conversions (see `mvm`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..chip.plan import choose, worst_case
from ..chip.program import ArrayState, columns_of, programmed_weights
from ..config.schema import CrossbarConfig
from ..config.structure import Structure, check_same, split_config, structure_of_arrays
from ..devices.physical import is_traced
from ..mapping import encoding
from ..mapping.adc import codes, converter, stacked_units
from ..read.definition import all_sums, with_mismatch, with_noise
from ..read.matmul import mvm, reading

# Resolution of the distribution of |current|: 1 / BINS of what an array could produce at most.
BINS = 4096
# Inputs of one read that enter the distribution, evenly spread; results and errors take all.
SAMPLES = 256
# The distribution of |x| has so many bins for each power of two, from 2^-_LEAST on: their edges are 1 % apart.
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


def probe(
    x: Float[Array, "*B d_in"],
    state: ArrayState,
    config: CrossbarConfig,
    key: Array | None = None,
    *,
    weights: Float[Array, "d_in d_out"] | None = None,
) -> tuple[Float[Array, "*B d_out"], Statistics]:
    """Read, and return what the converters met beside the result.

    Before calibration the result is that of an ideal ADC, with each input vector's largest |x| as the DAC's range.

    Args:
      x: inputs.
      state: of the chip.
      config: of the crossbar.
      key: of the noise.
      weights: what the error is measured against; None: the weights as programmed.
    """
    dtype, x = x.dtype, x.astype(state.codes.dtype)
    check_same(state.structure, config)
    if config.dac is not None and config.dac.scaling == "calibrated" and state.input_limit is None:
        config = dataclasses.replace(config, dac=dataclasses.replace(config.dac, scaling="row"))
        state = dataclasses.replace(state, structure=structure_of_arrays(config))
    if config.adc is not None and state.limits is None and state.plan.path != "product":
        ideal = dataclasses.replace(config, adc=None, device=dataclasses.replace(config.device, read_noise=None))
        path = "definition" if state.plan.path == "definition" else "product"
        plan, structure = dataclasses.replace(state.plan, path=path), structure_of_arrays(ideal)
        plain = dataclasses.replace(state, plan=plan, structure=structure)
        y = mvm(x, plain, ideal, key)
    else:
        y = mvm(x, state, config, key)
    batch = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    held = programmed_weights(state, config) if weights is None else weights.astype(batch.dtype)
    reference = batch @ held
    signal, error = jnp.sum(jnp.square(reference)), jnp.sum(jnp.square(y.reshape(reference.shape) - reference))
    structure, values = split_config(config)
    histogram, clipped, inputs, clipped_inputs = _met_by_converters(batch, state, values, key, structure=structure)
    return y.astype(dtype), Statistics(histogram, clipped, inputs, clipped_inputs, signal, error)


def calibrated(state: ArrayState, statistics: Statistics, config: CrossbarConfig) -> ArrayState:
    """Return the state with converters whose ranges cover `quantile` of the inputs, or of the conversions, seen.

    The range of a `calibrated` DAC comes first: what the ADCs meet depends on it, so that they need another probe.

    Ranges of the weight slices are powers of two apart, so that shift-and-add stays shifts. Where column sums are
    integers, steps are whole: of 1, 2, 4, ... levels the one with the least squared error on the sums seen, clipped
    ones among them. A range wide enough to lose nothing, whatever the inputs, turns the read into one product, whose
    conversions are not seen any more: it stays as it is.

    Args:
      state: one chip's, or with leading axes like those of the statistics.
      statistics: of probing reads.
      config: of the crossbar; unchanged unless a range of it is `calibrated`.

    Raises:
      ValueError: where no conversion was seen, or for another configuration than that of the arrays.
    """
    check_same(state.structure, config)
    adc, dac = config.adc, config.dac
    if dac is not None and dac.scaling == "calibrated" and state.input_limit is None:
        return dataclasses.replace(state, input_limit=_input_limit(statistics.inputs, dac.quantile))
    if adc is None or adc.range != "calibrated" or state.plan.path == "product":
        return state
    seen = jnp.cumsum(statistics.histogram, axis=-1)
    if not is_traced(seen) and not bool(jnp.all(seen[..., -1] > 0)):
        raise ValueError("calibration saw no conversion: probe the arrays with some inputs first")
    dtype = statistics.histogram.dtype
    bound = jnp.stack([jnp.asarray(b, dtype) for b in _extent(state, config)])
    if state.plan.ties is not None:
        lsb = _whole_steps(statistics.histogram, bound, codes(config)[1])
    else:
        reached = jnp.sum(seen < adc.quantile * seen[..., -1:], axis=-1) + 1
        lsb = reached.astype(dtype) / BINS * jnp.broadcast_to(bound, reached.shape) / codes(config)[1]
        base = jnp.max(lsb, axis=-1, keepdims=True)
        # 1e-3: a ratio that is a power of two but for rounding stays one.
        lsb = base * jnp.exp2(jnp.ceil(jnp.log2(lsb / base) - 1e-3))
    units = stacked_units(config, dtype)
    top = (lsb * codes(config)[1] / jnp.broadcast_to(units, lsb.shape))[..., None, :]
    limits = jnp.stack([-top if config.signed_sums else jnp.zeros_like(top), top], axis=-1)
    state = dataclasses.replace(state, limits=limits.astype(state.codes.dtype))
    if is_traced(limits) or not state.plan.integers:
        return state
    rows, _ = encoding.grid(state.shape, config)
    known = np.asarray(limits).reshape(-1, *limits.shape[-2:])
    bounds, columns = worst_case(config, max(rows)), state.shape[1]
    plans = [choose(config, bounds, one[None], columns=columns, perfect=True) for one in known]
    if all(plan.path == "product" for plan in plans) and state.plan.path != "definition":
        return dataclasses.replace(state, plan=plans[0], columns=None, cells=None)
    return state


def _input_limit(inputs: Float[Array, "*N bins"], quantile: float) -> Float[Array, "*N"]:
    """Return the edge of the bin up to which the inputs make `quantile` of all; 1 where that is the bin of zero."""
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


def _extent(state: ArrayState, config: CrossbarConfig) -> tuple[Array | float, ...]:
    """Return the largest |column sum| of every weight slice, Gmin included, in level units."""
    rows = max(encoding.grid(state.shape, config)[0])
    full, levels = rows * encoding.converted_top(config), encoding.levels(config)
    # Flipped columns stay below half of it, unless their cells are not at their targets.
    bounds = worst_case(config, rows) if state.plan.integers else [top * full for top in levels]
    return tuple(
        bound + top * full * config.g_min / (1 - config.g_min) for bound, top in zip(bounds, levels, strict=True)
    )


# Compiled, since its loop would be compiled anew at every call outside `jax.jit`.
@functools.partial(jax.jit, static_argnames=("structure",), inline=True)
def _met_by_converters(
    x: Float[Array, "B d_in"], state: ArrayState, values: list[Any], key: Array | None, *, structure: Structure
) -> tuple[Float[Array, "K bins"], Float[Array, " K"], Float[Array, " bins"], Float[Array, ""]]:
    """Return the distribution of |column sum| of every weight slice, how many were clipped, and likewise of inputs."""
    config = structure.config(values)
    slices = len(config.weight_slices)
    zeros = jnp.zeros((slices, BINS), x.dtype), jnp.zeros((slices,), x.dtype)
    step = max(1, x.shape[0] // SAMPLES)
    x = x[: step * SAMPLES : step]
    n, limit = reading(x, state, config, key)
    inputs, outside = jnp.zeros((BINS,), x.dtype), jnp.zeros((), x.dtype)
    if config.dac is not None:
        passed = jnp.abs(x) if config.dac.signed else jnp.maximum(x, 0)
        octaves = jnp.log2(jnp.maximum(passed, 2.0**-_LEAST)) + _LEAST
        at = jnp.clip(octaves * _OCTAVE, 0, BINS - 1).astype(jnp.int32)
        inputs = inputs.at[at.reshape(-1)].add(jnp.ones((), x.dtype))
        beyond = (jnp.abs(x) > limit) | ((x < 0) if not config.dac.signed else False)
        outside = jnp.sum(beyond, dtype=x.dtype)
    if config.adc is None or state.plan.path == "product":
        return *zeros, inputs, outside
    keys = None if key is None else jax.random.split(key, x.shape[0])
    bound = jnp.stack([jnp.asarray(b, x.dtype) for b in _extent(state, config)])
    quantise = None if state.limits is None else converter(state.limits, config, state.plan.ties)

    def of_one(total: tuple[Array, Array], one: tuple[Array, Array | None]) -> tuple[tuple[Array, Array], None]:
        sums, used = _sums(*one, state, config)
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


def _sums(
    n: Float[Array, " d_in"], key: Array | None, state: ArrayState, config: CrossbarConfig
) -> tuple[Float[Array, "K _J R S"], Float[Array, "R S"]]:
    """Return every sum that one input vector brings to the ADC, and 1 for those of columns in use."""
    rows, _ = encoding.grid(state.shape, config)
    tiles = encoding.split(n, rows, axis=0, front=True)
    worth = jnp.asarray(encoding.pulse_significance(config), n.dtype)
    if state.cells is not None:
        sums = all_sums(tiles, state.cells, key, config)  # [J, K, R, C, P, cols]
        if config.converts_sums:
            sums = jnp.tensordot(worth, sums, ((0,), (0,)))[None]
        sums = with_noise(with_mismatch(sums, state), config, key)
        cols = jnp.asarray(np.any(encoding.cells_in_use(state.shape, config), axis=2), n.dtype)  # [R, C, cols]
        if config.encoding.unit_column:
            cols = jnp.concatenate([cols, jnp.ones((*cols.shape[:2], 1), n.dtype)], axis=2)
        used = jnp.broadcast_to(cols[:, :, None], sums.shape[2:]).reshape(len(rows), -1)
        sums = sums.swapaxes(0, 1).reshape(*sums.shape[1::-1], len(rows), -1)
    else:
        sums = jnp.einsum("jri,krio->kjro", encoding.pulses(tiles, config), columns_of(state, config))
        polarities = sums.reshape(-1, len(config.weight_slices), *sums.shape[1:])
        sums = jnp.concatenate(list(polarities), axis=3)
        if config.converts_sums:
            sums = jnp.tensordot(worth, sums, ((0,), (1,)))[:, None]
        used = jnp.ones(sums.shape[2:], n.dtype)
    return sums, used
