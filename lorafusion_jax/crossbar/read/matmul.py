"""The matrix-vector product of programmed arrays.

    y = scale * limit / (2^m - 1) * sum_k 2^(P_k) lsb_k * sum_{r,j} 2^(s j) code[r, k, j]

over row tiles r, weight slices k, input slices j. Straight through DAC, ADC and quantisers, the derivatives are those
of `x @ W` with W the weights as programmed, compensation of drift included; the ADC's limits, and all else that a read
depends on, get those of a read whose ADC clips but does not round.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ...support.platform import is_traced
from ..chip.chip import Chip, check_correction
from ..chip.plan import loses_nothing
from ..devices.physical import is_moved
from ..mapping import encoding
from ..mapping.adc.quantiser import converter, level_units
from .paths import PATHS

# Powers of two within which factors are multiplied as they are: sums have up to 2^44 in addition.
_USUAL = 32
# JAX's product and its code: qwix replaces one of them while its models run.
_PRODUCT = jax.lax.dot_general, jax.lax.dot_general.__code__


def matmul(x: Float[Array, "*B d_in"], chip: Chip) -> Float[Array, "*B d_out"]:
    """Return `x @ W` as the arrays and their converters compute it, corrected digitally, in the dtype of `x`.

    It is computed in the dtype of the chip: float32 for weights of 16 bits. With read noise or stochastic rounding the
    chip needs another key for every read (see `with_read_key`).

    Raises:
      ValueError: the inputs or the correction have another width, a key is missing, an ADC has not been calibrated,
        these arrays cannot be read with its ranges, or another library has replaced JAX's products, as qwix does.
    """
    if (jax.lax.dot_general, jax.lax.dot_general.__code__) != _PRODUCT:
        # The read would be compiled with that product, and used by later reads of its shape.
        raise ValueError(
            "jax.lax.dot_general has been replaced, as by a model of qwix.quantize_model while it runs: read arrays "
            "outside of such a model"
        )
    if chip.tap is not None:
        return chip.tap.collect(x, dataclasses.replace(chip, tap=None))
    check_inputs(x, chip)
    key = "with_read_key(chip, jax.random.fold_in(key, step))"
    ranges = "calibrated(chip, probe(x, chip)[1])"
    check_ready(chip, "this crossbar", key=f"chip = {key}", ranges=f"chip = {ranges}")
    _check_limits(chip)
    if chip.correction is not None:
        check_correction(chip.correction, chip.name, chip.shape)
    if 0 in x.shape:
        return jnp.zeros((*x.shape[:-1], chip.shape[1]), x.dtype)
    batch = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(chip.codes.dtype)
    # Without its name, so that weights of one kind share a compiled read.
    bare = dataclasses.replace(chip, name="", correction=None, preparation=None)
    y = _compiled(prepared_inputs(batch, chip), bare)
    if chip.correction is not None:
        y = chip.correction(batch, y)
    return y.reshape(*x.shape[:-1], chip.shape[1]).astype(x.dtype)


def prepared_inputs(x: Float[Array, "*B d_in"], chip: Chip) -> Float[Array, "*B d_in"]:
    """Return the inputs of the DACs."""
    return x if chip.preparation is None else chip.preparation.inputs(x)


def check_inputs(x: Array, chip: Chip) -> None:
    """Raise a ValueError for inputs [..., d_in] of another width or of integers, and for a stack of chips."""
    shape = chip.matrix_shape
    if chip.codes.ndim != 2:
        raise ValueError(
            f"a stack of chips of shape {chip.shape}: take one, or map over the stack with jax.vmap"
        )
    if x.shape[-1:] != shape[:1]:
        raise ValueError(
            f"x of shape {x.shape} meets arrays of {shape}: its last axis must be {shape[0]}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x of dtype {x.dtype}: give floating point numbers")


def check_ready(chip: Chip, name: str, *, key: str, ranges: str) -> None:
    """Raise a ValueError for a chip without a key or ranges that it needs, with code that gives them."""
    config = chip.config
    if config.reads_at_random and chip.key is None:
        raise ValueError(
            f"{name} draws noise, or rounds at random, again for every read: give it a key, as in {key}"
        )
    if chip.awaits_inputs:
        raise ValueError(
            f"{name} has a DAC whose range comes from data: {ranges}, or choose dac.scaling = 'row'"
        )
    if (
        config.adc is not None
        and chip.limits is None
        and PATHS[chip.plan.path].converts
    ):
        raise ValueError(
            f"{name} has an ADC whose range comes from data: {ranges}, or choose adc.range = 'max'"
        )


# Compiled, because the loops of a read would otherwise be compiled again at every call outside `jax.jit`.
@functools.partial(jax.jit, inline=True)
def _compiled(x: Float[Array, "B d_in"], chip: Chip) -> Float[Array, "B d_out"]:
    paths, tree = jax.tree.flatten_with_path(chip)
    value_names = iter(chip.structure.names)
    fields = [jax.tree_util.keystr(path[:1], simple=True) for path, _ in paths]
    names = tuple(next(value_names) if field == "values" else field for field in fields)
    return _read(tree, names, x, [leaf for _, leaf in paths])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _read(
    tree: Any, names: tuple[str, ...], x: Float[Array, "B d_in"], leaves: list[Any]
) -> Float[Array, "B d_out"]:
    """Return the product of one read of a chip with this tree; JAX would fill the chip's class with placeholders.

    The names of the leaves are fields of the chip and paths of the configuration.
    """
    chip: Chip = jax.tree.unflatten(tree, leaves)
    return _multiply(x, full_scale(x, chip), chip, rounds=True)


def _multiply(
    x: Float[Array, "B d_in"],
    limit: Float[Array, ""] | Float[Array, "B 1"],
    chip: Chip,
    *,
    rounds: bool,
) -> Float[Array, "B d_out"]:
    """Return the product as the arrays and their converters compute it; without `rounds`, ADCs only clip."""
    geometry = chip.geometry
    config = chip.config
    n = encoding.input_codes(x, limit, geometry, config, chip.key)
    limit = jnp.where(jnp.isfinite(limit), limit, jnp.nan)
    # The factors, one after the other, could leave the range of the dtype where their product is within it.
    scale, limit, exponents = _within_range(chip.scale, limit)
    chip = dataclasses.replace(chip, scale=scale)
    quantise = None
    if chip.limits is not None:
        quantise = converter(chip.limits, geometry, config, chip.plan.ties)._replace(
            rounds=rounds
        )
    y = PATHS[chip.plan.path].read(n, quantise, chip)
    y = y * (limit / geometry.input_top)
    for power in exponents:
        y = y * power
    # Codes are integers on most paths, and counted as such, which NaN cannot be. A full scale of NaN has made y NaN.
    if chip.input_limit is not None:
        y = jnp.where(jnp.all(~jnp.isnan(n), axis=1, keepdims=True), y, jnp.nan)
    if (
        config.adc is not None
        and chip.limits is not None
        and not PATHS[chip.plan.path].converts
    ):
        y = jnp.where(loses_nothing(chip.limits, geometry, config), y, jnp.nan)
    return y


def _within_range(
    scale: Array, limit: Array
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Return both factors of a read without their powers of two beyond 2^+-_USUAL, and those powers in two halves."""

    def beyond(top: Array) -> Array:
        exponent = jnp.frexp(jax.lax.stop_gradient(top))[1]
        return exponent - jnp.clip(exponent, -_USUAL, _USUAL)

    def two_to(exponent: Array) -> Array:
        return jnp.ldexp(jnp.ones(exponent.shape, scale.dtype), exponent)

    scale_exponent = beyond(jnp.max(scale, axis=0, keepdims=True))
    limit_exponent = beyond(limit)
    both = scale_exponent + limit_exponent
    half = both // 2
    return (
        scale * two_to(-scale_exponent),
        limit * two_to(-limit_exponent),
        (two_to(half), two_to(both - half)),
    )


@functools.partial(_read.defjvp, symbolic_zeros=True)
def _derivative(tree, names, primals, tangents):
    x, leaves = primals
    x_dot, leaves_dot = tangents
    chip: Chip = jax.tree.unflatten(tree, leaves)
    geometry = chip.geometry
    config = chip.config
    moved = {
        name: dot for name, dot in zip(names, leaves_dot, strict=True) if is_moved(dot)
    }
    if config.tile.wire is not None:
        for name in moved:
            if name.startswith(
                (
                    "cell.on_off_ratio",
                    "tile.wire",
                    "adc.noise",
                    "device.read_noise",
                    "device.iv",
                )
            ):
                raise ValueError(
                    f"{name} has no gradient with resistive wires: use lax.stop_gradient, or take differences"
                )
    y = _read(tree, names, x, leaves)
    terms = []
    inside = jnp.ones_like(x, bool)
    seen = x
    limit = full_scale(x, chip)
    if config.dac is not None and (
        chip.input_limit is not None or not config.dac.signed
    ):
        low = -limit if config.dac.signed else jnp.zeros_like(limit)
        inside = (x >= low) & (x <= limit)
        seen = jnp.clip(x, low, limit)

    def times(x: Array, codes: Array, scale: Array = chip.scale) -> Array:
        if scale.shape[0] > 1:
            return jnp.dot(
                x, codes * encoding.per_weight(scale, geometry), precision="highest"
            )
        return jnp.dot(x, codes, precision="highest") * scale

    if is_moved(x_dot):
        terms.append(times(jnp.where(inside, x_dot, 0), chip.codes))
    if "codes" in moved:
        terms.append(times(seen, moved["codes"]))
    if "scale" in moved and config.dac is not None:
        # Below, the scale multiplies rounded inputs, but the codes' term has unrounded ones: compensation of drift
        # moves both, and they have to cancel.
        rounded = encoding.input_codes(x, limit, geometry, config, chip.key) * (
            limit / geometry.input_top
        )
        terms.append(times(seen - rounded, chip.codes, moved["scale"]))
    if "input_limit" in moved:
        # y = limit f(x / limit), and f passes the inputs within the range straight through (LSQ, Esser et al. 2020).
        rest = y - times(jnp.where(inside, x, 0), chip.codes)
        terms.append(moved["input_limit"] / chip.input_limit * rest)
    moved_leaves = [
        i
        for i, name in enumerate(names)
        if name in moved and name not in ("codes", "input_limit")
    ]
    if moved_leaves:

        def smooth(values: list[Array]) -> Array:
            changed = dict(zip(moved_leaves, values, strict=True))
            moving = jax.tree.unflatten(
                tree, [changed.get(i, leaf) for i, leaf in enumerate(leaves)]
            )
            return _multiply(x, limit, moving, rounds=False)

        terms.append(
            jax.jvp(
                smooth,
                ([leaves[i] for i in moved_leaves],),
                ([leaves_dot[i] for i in moved_leaves],),
            )[1]
        )
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


def _check_limits(chip: Chip) -> None:
    """Raise an error for ADC ranges, set after programming, that the arrays cannot be read with."""
    limits = chip.limits
    geometry = chip.geometry
    config = chip.config
    if config.adc is None or limits is None:
        return
    slices = len(geometry.levels)
    row_tiles = len(geometry.rows)
    if limits.shape not in {(1, slices, 2), (row_tiles, slices, 2)}:
        raise ValueError(
            f"chip.limits of shape {limits.shape}: give (1, {slices}, 2) or ({row_tiles}, {slices}, 2)"
        )
    # Units of a configuration's arrays are traced inside a transformation even where the chip is not.
    if PATHS[chip.plan.path].converts or is_traced(
        (limits, level_units(geometry, config))
    ):
        return
    if not loses_nothing(np.asarray(limits), geometry, config):
        raise ValueError(
            "chip.limits lose bits, but this chip is a product: program with path='loop' or these limits"
        )


def full_scale(
    x: Float[Array, "B d_in"], chip: Chip
) -> Float[Array, ""] | Float[Array, "B 1"]:
    """Return the input that the DAC's highest code stands for."""
    if chip.input_limit is not None:
        return chip.input_limit
    limit = jnp.max(
        jnp.abs(x) if chip.config.signed_inputs else jnp.maximum(x, 0),
        axis=1,
        keepdims=True,
    )
    return jnp.where(limit == 0, jnp.ones_like(limit), limit)
