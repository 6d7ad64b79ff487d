"""The matrix-vector product of programmed arrays.

    y = scale * limit / (2^m - 1) * sum_k 2^(P_k) lsb_k * sum_{r,j} 2^(s j) code[r, k, j]

over row tiles r, weight slices k, input slices j. Straight through DAC, ADC and quantisers, the gradients are those
of `x @ W` with W the weights as programmed; the ADC's limits get that of clipping.

Axis letters: B batch, K weight slices, k conversions of a pair of slices (K, or 2 K where both polarities are
converted), R row tiles (1 once summed), C column tiles.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import encoding
from .adc import Converter, converter
from .config import CrossbarConfig
from .conversions import convert_tiles
from .definition import all_sums, shift_and_add
from .normal import normal
from .recombine import finish
from .state import ArrayState
from .values import like

# Bytes that the conversions of one read may take at a time.
BUDGET = 256 * 2**20


def mvm(
    x: Float[Array, "*B d_in"], state: ArrayState, config: CrossbarConfig, key: Array | None = None
) -> Float[Array, "*B d_out"]:
    """Multiply by a programmed matrix: what the arrays and their converters make of `x @ W`.

    Args:
      x: inputs.
      state: from `program`, with this config.
      config: of the crossbar.
      key: of this read's noise; needed with read noise, another one for every read.

    Raises:
      ValueError: on inputs of another width, a missing key, or an ADC that has not been calibrated.
    """
    if x.shape[-1] != state.shape[0]:
        raise ValueError(f"x of shape {x.shape} meets arrays of {state.shape}: its last axis must be {state.shape[0]}")
    if config.device.read_noise is not None and key is None:
        raise ValueError("read noise is drawn anew for every read: give its key, as in jax.random.fold_in(key, step)")
    if config.adc is not None and state.limits is None and state.plan.path != "product":
        raise ValueError(
            "this ADC's range comes from data: state = calibrated(state, probe(x, state, config)[1], config), "
            "or choose adc.range = 'max'"
        )
    chip, tree = jax.tree.flatten((state, config, key))
    y: Array = _read(tree, x.reshape(-1, x.shape[-1]), state.codes, state.limits, chip)
    return y.reshape(*x.shape[:-1], state.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(
    tree: Any,
    x: Float[Array, "B d_in"],
    codes: Float[Array, "d_in d_out"],
    limits: Float[Array, "_R K 2"] | None,
    chip: list[Any],
) -> Float[Array, "B d_out"]:
    """Read; `chip` are the leaves of (state, config, key), whose classes JAX would fill with placeholders."""
    state, config, key = jax.tree.unflatten(tree, chip)
    limit = _full_scale(x, state)
    n = encoding.input_codes(x, limit, config)
    quantise = None if limits is None else converter(limits, config)
    return _converted(n, quantise, codes, state, config, key) * (limit / encoding.input_top(config))


def reading(x: Float[Array, "B d_in"], state: ArrayState, config: CrossbarConfig) -> Float[Array, "B d_in"]:
    """Return the input codes of a read."""
    return encoding.input_codes(x, _full_scale(x, state), config)


def _full_scale(x: Float[Array, "B d_in"], state: ArrayState) -> Float[Array, ""] | Float[Array, "B 1"]:
    """Return the input that the DAC's highest code stands for."""
    if state.input_limit is not None:
        return state.input_limit
    limit = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    return jnp.where(limit > 0, limit, jnp.ones_like(limit))


def _converted(
    n: Float[Array, "B d_in"],
    quantise: Converter | None,
    codes: Float[Array, "d_in d_out"],
    state: ArrayState,
    config: CrossbarConfig,
    key: Array | None,
) -> Float[Array, "B d_out"]:
    """Return weights times input codes, by the plan's path."""
    if state.plan.path == "product":
        return _product(n, codes, state, config, key)
    if state.plan.path != "definition":
        assert quantise is not None
        return convert_tiles(n, quantise, state, config, key)
    return _definition(n, quantise, state, config, key)


def _forward(tree, x, codes, limits, chip):
    return _read(tree, x, codes, limits, chip), (x, codes, limits, chip)


def _backward(tree, residuals, cotangent):
    x, codes, limits, chip = residuals
    state, config, key = jax.tree.unflatten(tree, chip)
    scale = encoding.per_weight(state.scale, state.shape, config)
    d_x = jnp.dot(cotangent, (codes * scale).T, precision="highest")
    seen = x
    if state.input_limit is not None and config.dac is not None:
        low = -state.input_limit if config.dac.signed else jnp.zeros_like(state.input_limit)
        d_x = jnp.where((x >= low) & (x <= state.input_limit), d_x, 0)
        seen = jnp.clip(x, low, state.input_limit)
    d_codes = jnp.dot(seen.T, cotangent, precision="highest") * scale
    d_limits = None
    if limits is not None:  # under jit, not computed where nobody asks for it

        def saturating(limits: Array) -> Array:
            limit = _full_scale(x, state)
            n = encoding.input_codes(x, limit, config)
            quantise = converter(limits, config)._replace(rounds=False)
            return _converted(n, quantise, codes, state, config, key) * (limit / encoding.input_top(config))

        (d_limits,) = jax.vjp(saturating, limits)[1](cotangent)
    return d_x, d_codes, d_limits, None


_read.defvjp(_forward, _backward)


def _product(
    n: Float[Array, "B d_in"],
    codes: Float[Array, "d_in d_out"],
    state: ArrayState,
    config: CrossbarConfig,
    key: Array | None,
) -> Float[Array, "B d_out"]:
    """Multiply once; read noise, a sum of normal draws over all slices and rows, is one draw for each output."""
    tiled = state.scale.shape[0] > 1
    per_weight = encoding.per_weight(state.scale, state.shape, config)
    y = jnp.dot(n, codes * per_weight if tiled else codes, precision="highest")
    noise = config.device.read_noise
    if noise is not None and state.variance is not None and key is not None:
        _, cols = encoding.grid(state.shape, config)
        variance = state.variance
        if tiled:
            if config.encoding.unit_column:
                starts = np.cumsum((0, *cols[:-1]))
                per_weight = jnp.concatenate([per_weight, per_weight[:, starts]], axis=1)
            variance = variance * jnp.square(per_weight)
        worth = jnp.square(jnp.asarray(encoding.pulse_significance(config), n.dtype))
        power = jnp.einsum("j,jbi->bi", worth, jnp.square(encoding.pulses(n, config)))
        spread = jnp.sqrt(jnp.dot(power, variance, precision="highest")) * like(noise.sigma, n)
        outputs = state.shape[1] + (len(cols) if config.encoding.unit_column else 0)
        drawn = spread * normal(key, (n.shape[0], outputs), n.dtype)
        if config.encoding.unit_column:  # one draw for each array's unit column, shared by all its outputs
            drawn, units = drawn[:, : state.shape[1]], drawn[:, state.shape[1] :]
            drawn = drawn - jnp.repeat(units, np.asarray(cols), axis=1, total_repeat_length=state.shape[1])
        y = y + drawn
    return y if tiled else y * state.scale


def _definition(
    n: Float[Array, "B d_in"], quantise: Converter | None, state: ArrayState, config: CrossbarConfig, key: Array | None
) -> Float[Array, "B d_out"]:
    """Compute as many inputs at a time as the budget allows."""
    rows, _ = encoding.grid(state.shape, config)
    cells = state.cells
    assert cells is not None
    tiles = encoding.split(n, rows, axis=1, front=True)
    keys = None if key is None else jax.random.split(key, n.shape[0])

    def of_one(arguments: tuple[Array, Array | None]) -> Array:
        codes, key = arguments
        sums = all_sums(codes, cells, key, config)
        total = shift_and_add(sums, None if quantise is None else _converter_of_chip(quantise, state), config)
        total = total[..., 0, :] - total[..., 1, :] if total.shape[3] == 2 else total[..., 0, :]
        ones = jnp.sum(codes, axis=1)[:, None, None]
        one_range = quantise is None or quantise.inv_lsb.shape[0] == 1
        if state.flipped is None and state.scale.shape[0] == 1 and one_range:
            total, ones = jnp.sum(total, axis=1, keepdims=True), jnp.sum(ones, axis=0, keepdims=True)
        return jnp.sum(finish(total, ones, quantise, state, config) * state.scale, axis=0)

    conversions = math.prod(cells.shape) // cells.shape[4] * len(config.input_slices)
    chunk = max(1, BUDGET // (conversions * n.dtype.itemsize))
    if chunk >= n.shape[0]:
        return jax.vmap(of_one)((tiles, keys))
    return jax.lax.map(of_one, (tiles, keys), batch_size=chunk)


def _converter_of_chip(quantise: Converter, state: ArrayState):
    """Return the conversion of sums [..., K, R, C, P, cols], each column with its own gain and offset."""

    def convert(sums: Array) -> Array:
        for error, apply in ((state.gain, jnp.multiply), (state.offset, jnp.add)):
            if error is not None:
                sums = apply(sums, jnp.broadcast_to(jnp.moveaxis(error, 1, 3), sums.shape))
        return quantise(sums, jnp.broadcast_to(quantise.inv_lsb.T[:, :, None, None, None], sums.shape))

    return convert
