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

from . import arrays, encoding
from .adc import Converter, converter
from .config import CrossbarConfig
from .definition import all_sums, shift_and_add
from .lookup import lookup
from .loop import loop
from .noise import Noise, deviations, stream
from .normal import normal
from .packing import Packed
from .state import ArrayState
from .values import like

_Operand = tuple[Any, Array | None, Array | None, Array | None, Array | None]

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
    y = _read(tree, x.reshape(-1, x.shape[-1]), state.codes, state.limits, chip)
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
    if state.plan.path in ("loop", "lookup"):
        assert quantise is not None
        return _tile_by_tile(n, quantise, state, config, key)
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
    if state.variance is not None and key is not None:
        _, cols = encoding.grid(state.shape, config)
        variance = state.variance
        if tiled:
            if config.encoding.unit_column:
                starts = np.cumsum((0, *cols[:-1]))
                per_weight = jnp.concatenate([per_weight, per_weight[:, starts]], axis=1)
            variance = variance * jnp.square(per_weight)
        worth = jnp.square(jnp.asarray(encoding.pulse_significance(config), n.dtype))
        power = jnp.einsum("j,jbi->bi", worth, jnp.square(encoding.pulses(n, config)))
        spread = jnp.sqrt(jnp.dot(power, variance, precision="highest")) * like(config.device.read_noise.sigma, n)
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
        return jnp.sum(_finish(total, ones, quantise, state, config) * state.scale, axis=0)

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


def _finish(
    total: Float[Array, "K A C cols"],
    ones: Float[Array, "#A 1 1"],
    quantise: Converter | None,
    state: ArrayState,
    config: CrossbarConfig,
) -> Float[Array, "A d_out"]:
    """Return the weighted sum over weight slices, in weight codes times input codes.

    Args:
      total: codes, or sums without an ADC, shifted and added over input slices; unit columns last.
      ones: sums of the inputs, for what is removed digitally.
      quantise: the ADC.
      state: of the chip.
      config: of the crossbar.
    """
    lsb = None if quantise is None else 1 / quantise.inv_lsb
    if config.encoding.kind == "offset" and (state.flipped is not None or not config.encoding.unit_column):
        if lsb is not None:
            total = total * lsb.T[:, :, None, None]
        return _weigh(arrays.recover(total, ones, state.flipped, config), None, state, config)
    if config.encoding.unit_column:
        total = total[..., :-1] - total[..., -1:]
    return _weigh(total, lsb, state, config)


def _weigh(
    slices: Float[Array, "K A C cols"], lsb: Float[Array, "_R K"] | None, state: ArrayState, config: CrossbarConfig
) -> Float[Array, "A d_out"]:
    """Return the sum over weight slices, each times what its level (or its code, given `lsb`) is worth."""
    worth = jnp.asarray(encoding.significance(config), slices.dtype)[None]
    if lsb is not None:
        worth = worth * lsb
    # Powers of two times integers add up exactly in any order; what is left is one factor.
    shares = (worth / worth[:, :1]).T[:, :, None, None]
    whole = sum(share * of_slice for share, of_slice in zip(shares, slices, strict=True))
    _, cols = encoding.grid(state.shape, config)
    return encoding.join(whole * worth[:, 0, None, None], cols, axis=1)


def _tile_by_tile(
    n: Float[Array, "B d_in"], quantise: Converter, state: ArrayState, config: CrossbarConfig, key: Array | None
) -> Float[Array, "B d_out"]:
    """Sum over row tiles in codes; where each tile has a scale of its own, tile by tile."""
    rows, cols = encoding.grid(state.shape, config)
    tiles = encoding.split(n, rows, axis=1, front=True)
    slices = config.input_slices if config.dac else None
    if config.dac is not None and config.adc is not None and config.adc.convert == "sum":
        slices = (config.dac.magnitude_bits,)
    each = 2 if arrays.converts_each(config) else 1
    kernel_adc = quantise._replace(inv_lsb=jnp.tile(quantise.inv_lsb[0], each))
    if state.flipped is not None:  # negated columns
        kernel_adc = kernel_adc._replace(qmin=-quantise.qmax)

    def codes(tiles: Array, columns: Any, variance: Array | None, occupied: Array | None, number: Array | int) -> Array:
        """Return the codes of columns [k, B, cols], with noise that belongs to `number`."""
        noise = None
        if config.device.read_noise is not None and key is not None:
            scale = jnp.tile(deviations(config, n.dtype), each)
            noise = Noise(variance, scale, stream(jax.random.fold_in(key, number)))
        if state.plan.path == "loop":
            return loop(tiles, columns, kernel_adc, slices, occupied, noise)
        packing = state.plan.packing if isinstance(columns, Packed) else None
        return lookup(tiles, columns, packing, kernel_adc, slices, signed=config.signed_inputs, noise=noise)

    def of_tiles(tiles: Array, operand: _Operand, number: Array | int) -> Array:
        columns, units, variance, occupied, flipped = operand
        if units is not None and variance is not None and variance.shape[3] > 1:
            of_units, variance = variance[..., state.shape[1] :], variance[..., : state.shape[1]]
        else:
            of_units = variance
        total = codes(tiles, columns, variance, occupied, 2 * number)
        if each == 2:
            total = total[: len(total) // 2] - total[len(total) // 2 :]
        whole = encoding.split(total[..., : state.shape[1]], cols, axis=2)
        if units is not None:
            lsb = 1 / quantise.inv_lsb[0, :, None, None, None]

            def of_tile(tile: tuple[Array, Array, Array | None, Array]) -> Array:
                x, units, variance, r = tile
                variance = None if variance is None else variance[:, None]
                return codes(x[:, None], units[:, None], variance, None, 2 * (number + r) + 1)

            by_tile = jax.tree.map(lambda a, axis=1: jnp.moveaxis(a, axis, 0), (tiles, units, of_units))
            measured = jax.lax.map(of_tile, (*by_tile, jnp.arange(tiles.shape[1])))
            measured = jnp.moveaxis(measured, 0, 1) * lsb
            return _weigh(arrays.recover_flipped(whole * lsb, measured, flipped, config), None, state, config)
        if config.encoding.unit_column:
            whole = jnp.concatenate([whole, total[..., state.shape[1] :, None]], axis=3)
        ones = jnp.sum(tiles, axis=(1, 2))[:, None, None]
        return _finish(whole, ones, quantise, state, config)

    operand = state.columns, state.units, state.variance, state.occupied, state.flipped
    if state.scale.shape[0] == 1:
        return of_tiles(tiles, operand, 0) * state.scale

    def add(y: Array, tile: tuple[Array, Any, Array, Array]) -> tuple[Array, None]:
        x, operand, scale, number = tile
        one = jax.tree.map(lambda a: jnp.expand_dims(a, 1), operand)
        return y + of_tiles(x[:, None], one, number) * scale[None], None

    zero = jnp.zeros((n.shape[0], state.shape[1]), n.dtype)
    by_tile = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (tiles, operand))
    return jax.lax.scan(add, zero, (*by_tile, state.scale, jnp.arange(len(rows))))[0]
