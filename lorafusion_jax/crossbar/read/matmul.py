"""The matrix-vector product of programmed arrays.

    y = scale * limit / (2^m - 1) * sum_k 2^(P_k) lsb_k * sum_{r,j} 2^(s j) code[r, k, j]

over row tiles r, weight slices k, input slices j. Straight through DAC, ADC and quantisers, the derivatives are those
of `x @ W` with W the weights as programmed; the ADC's limits, and all else that a read depends on, get those of a
read whose ADC clips but does not round.

Axis letters: B batch, K weight slices, k conversions of a pair of slices (K, or 2 K where both polarities are
converted), R row tiles (1 once summed), C column tiles.
"""

import functools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..chip.plan import loses_nothing, worst_case
from ..chip.program import ArrayState
from ..config.schema import CrossbarConfig
from ..config.structure import Structure, check_same, split_config
from ..devices.physical import is_moved, is_traced
from ..mapping import encoding
from ..mapping.adc import Converter, converter
from .by_kernel import convert_tiles
from .definition import definition
from .product import product


def mvm(
    x: Float[Array, "*B d_in"], state: ArrayState, config: CrossbarConfig, key: Array | None = None
) -> Float[Array, "*B d_out"]:
    """Multiply by a programmed matrix: what the arrays and their converters make of `x @ W`, in the dtype of `x`.

    Computed in the dtype of the state: float32 for weights of 16 bits.

    Args:
      x: inputs, of any floating dtype; there may be none.
      state: from `program`, with this config; only what acts at a read may differ (see `structure_of_arrays`), and
        values that are arrays are not compared.
      config: of the crossbar.
      key: of this read, another one for every read; needed with noise or stochastic rounding.

    Raises:
      ValueError: on inputs of another width, another configuration, a missing key, an ADC that has not been
        calibrated, or ranges that these arrays cannot be read with.
    """
    if x.shape[-1] != state.shape[0]:
        raise ValueError(f"x of shape {x.shape} meets arrays of {state.shape}: its last axis must be {state.shape[0]}")
    check_same(state.structure, config)
    if config.reads_at_random and key is None:
        raise ValueError(
            "this crossbar draws noise, or rounds at random, anew for every read: give its key, as in "
            "jax.random.fold_in(key, step)"
        )
    if config.dac is not None and config.dac.scaling == "calibrated" and state.input_limit is None:
        raise ValueError(
            "this DAC's range comes from data: state = calibrated(state, probe(x, state, config)[1], config), "
            "or choose dac.scaling = 'row'"
        )
    if config.adc is not None and state.limits is None and state.plan.path != "product":
        raise ValueError(
            "this ADC's range comes from data: state = calibrated(state, probe(x, state, config)[1], config), "
            "or choose adc.range = 'max'"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x of dtype {x.dtype}: give floating point numbers")
    _check_limits(state, config)
    if 0 in x.shape:
        return jnp.zeros((*x.shape[:-1], state.shape[1]), x.dtype)
    structure, values = split_config(config)
    batch = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(state.codes.dtype)
    y = _compiled(batch, state, values, key, structure=structure)
    return y.reshape(*x.shape[:-1], state.shape[1]).astype(x.dtype)


class _Chip(NamedTuple):
    """What leaves of (state, the configuration's arrays, key) belong to; JAX would fill the classes with placeholders.

    Attributes:
      tree: of the three.
      structure: of the configuration.
      names: of the leaves: fields of the state, paths of the configuration.
    """

    tree: Any
    structure: Structure
    names: tuple[str, ...]

    def parts(self, leaves: list[Any]) -> tuple[ArrayState, CrossbarConfig, Array | None]:
        """Return the state, the configuration and the key."""
        state, values, key = jax.tree.unflatten(self.tree, leaves)
        return state, self.structure.config(values), key


# Compiled, since the loops of a read would be compiled anew at every call outside `jax.jit`.
@functools.partial(jax.jit, static_argnames=("structure",), inline=True)
def _compiled(
    x: Float[Array, "B d_in"], state: ArrayState, values: list[Any], key: Array | None, *, structure: Structure
) -> Float[Array, "B d_out"]:
    paths, tree = jax.tree.flatten_with_path((state, values, key))
    of_state = [jax.tree_util.keystr(path[1:2], simple=True) for path, _ in paths if path[0].idx == 0]
    of_key = [] if key is None else ["key"]
    chip = _Chip(tree, structure, (*of_state, *structure.names, *of_key))
    return _read(chip, x, [leaf for _, leaf in paths])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _read(chip: _Chip, x: Float[Array, "B d_in"], leaves: list[Any]) -> Float[Array, "B d_out"]:
    """Read."""
    state, config, key = chip.parts(leaves)
    return _multiply(x, _full_scale(x, state, config, key), state, config, key, rounds=True)


def _multiply(
    x: Float[Array, "B d_in"],
    limit: Float[Array, ""] | Float[Array, "B 1"],
    state: ArrayState,
    config: CrossbarConfig,
    key: Array | None,
    *,
    rounds: bool,
) -> Float[Array, "B d_out"]:
    """Return what the arrays and their converters make of x; without `rounds`, ADCs only clip."""
    n = encoding.input_codes(x, limit, config, key)
    quantise = _converter(state, config)
    if quantise is not None:
        quantise = quantise._replace(rounds=rounds)
    y = _by_path(n, quantise, state.codes, state, config, key) * (limit / encoding.input_top(config))
    # Codes are integers on most paths, and counted as such, which NaN cannot be.
    known = jnp.all(~jnp.isnan(n), axis=1, keepdims=True)
    if config.adc is not None and state.limits is not None and state.plan.path == "product":
        known &= loses_nothing(state.limits, _bounds(state, config), config)
    return jnp.where(known, y, jnp.nan)


@functools.partial(_read.defjvp, symbolic_zeros=True)
def _derivative(chip, primals, tangents):
    x, leaves = primals
    x_dot, leaves_dot = tangents
    state, config, key = chip.parts(leaves)
    moved = {name: dot for name, dot in zip(chip.names, leaves_dot, strict=True) if is_moved(dot)}
    _check_moved(moved, config)
    y = _read(chip, x, leaves)
    parts = []
    inside, seen = jnp.ones_like(x, bool), x
    limit = _full_scale(x, state, config, key)
    if config.dac is not None and (state.input_limit is not None or not config.dac.signed):
        low = -limit if config.dac.signed else jnp.zeros_like(limit)
        inside, seen = (x >= low) & (x <= limit), jnp.clip(x, low, limit)

    def times(x: Array, codes: Array) -> Array:
        if state.scale.shape[0] > 1:
            return jnp.dot(x, codes * encoding.per_weight(state.scale, state.shape, config), precision="highest")
        return jnp.dot(x, codes, precision="highest") * state.scale

    if is_moved(x_dot):
        parts.append(times(jnp.where(inside, x_dot, 0), state.codes))
    if "codes" in moved:
        parts.append(times(seen, moved["codes"]))
    if "input_limit" in moved:
        # y = limit f(x / limit), and f passes the inputs within the range straight through (LSQ, Esser et al. 2020).
        rest = y - times(jnp.where(inside, x, 0), state.codes)
        parts.append(moved["input_limit"] / state.input_limit * rest)
    others = [i for i, name in enumerate(chip.names) if name in moved and name not in ("codes", "input_limit")]
    if others:

        def smooth(values: list[Array]) -> Array:
            changed = dict(zip(others, values, strict=True))
            moving = chip.parts([changed.get(i, leaf) for i, leaf in enumerate(leaves)])
            return _multiply(x, limit, *moving, rounds=False)

        parts.append(jax.jvp(smooth, ([leaves[i] for i in others],), ([leaves_dot[i] for i in others],))[1])
    return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)


def _check_moved(moved: Collection[str], config: CrossbarConfig) -> None:
    """Refuse derivatives that a read does not have, rather than return zeros.

    Args:
      moved: names of the leaves that are differentiated.
      config: of the crossbar.
    """
    of_read = ("cell.on_off_ratio", "tile.", "adc.noise", "device.read_noise.", "device.iv.")
    for name in moved:
        if "." not in name:
            continue
        if not name.startswith(of_read) and all("." in other for other in moved):
            raise ValueError(
                f"{name} is not used by a read: it acts where arrays are programmed, if at all. Call program (or "
                "program_tree) inside what is differentiated"
            )
        if config.tile.wire is not None and name.startswith(of_read) and name != "tile.current_limit":
            raise ValueError(
                f"{name} has no gradient on arrays with resistive wires, whose currents are iterated until they are "
                "within a tolerance: leave it out with jax.lax.stop_gradient, or take differences"
            )


def _check_limits(state: ArrayState, config: CrossbarConfig) -> None:
    """Refuse ADC ranges, put into the state after programming, that its arrays cannot be read with."""
    limits, slices = state.limits, len(config.weight_slices)
    if config.adc is None or limits is None:
        return
    row_tiles = len(encoding.grid(state.shape, config)[0])
    if limits.shape not in {(1, slices, 2), (row_tiles, slices, 2)}:
        raise ValueError(
            f"state.limits of shape {limits.shape}: give one range for all row tiles, (1, {slices}, 2), or "
            f"({row_tiles}, {slices}, 2)"
        )
    if state.plan.path != "product" or is_traced(limits):
        return
    if not loses_nothing(limits, _bounds(state, config), config):
        raise ValueError(
            "state.limits lose bits, but these arrays were put into one product since their ADC lost none: program "
            "them with path='loop', or with adc.range='given' and these limits"
        )


def _bounds(state: ArrayState, config: CrossbarConfig) -> tuple[float, ...]:
    return worst_case(config, max(encoding.grid(state.shape, config)[0]))


def reading(
    x: Float[Array, "B d_in"], state: ArrayState, config: CrossbarConfig, key: Array | None
) -> tuple[Float[Array, "B d_in"], Float[Array, ""] | Float[Array, "B 1"]]:
    """Return the input codes of a read, and the input that the highest of them stands for."""
    limit = _full_scale(x, state, config, key)
    return encoding.input_codes(x, limit, config, key), limit


def _full_scale(
    x: Float[Array, "B d_in"], state: ArrayState, config: CrossbarConfig, key: Array | None
) -> Float[Array, ""] | Float[Array, "B 1"]:
    """Return the input that the DAC's highest code stands for, doubled where a read is repeated at half of it."""
    limit = state.input_limit
    if limit is None:
        limit = jnp.max(jnp.abs(x) if config.signed_inputs else jnp.maximum(x, 0), axis=1, keepdims=True)
        limit = jnp.where(limit == 0, jnp.ones_like(limit), limit)
    quantise = _converter(state, config)
    if quantise is None or config.adc is None or config.adc.retries == 0 or state.plan.path == "product":
        return limit
    counting, retries = quantise._replace(counts=True), config.adc.retries

    def clipped(limit: Float[Array, "B 1"]) -> Bool[Array, "B 1"]:
        codes = encoding.input_codes(x, limit, config, key)
        return _by_path(codes, counting, state.codes, state, config, key) > 0

    def proceed(carry: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        _, again, count = carry
        return (count < retries) & jnp.any(again)

    def halve(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        limit, again, count = carry
        limit = jnp.where(again, 2 * limit, limit)
        return limit, again & clipped(limit), count + 1

    first = jnp.broadcast_to(jax.lax.stop_gradient(limit), (x.shape[0], 1))
    last, _, _ = jax.lax.while_loop(proceed, halve, (first, clipped(first), jnp.int32(0)))
    return limit * jax.lax.stop_gradient(last / limit)


def _converter(state: ArrayState, config: CrossbarConfig) -> Converter | None:
    return None if state.limits is None else converter(state.limits, config, state.plan.ties)


def _by_path(
    n: Float[Array, "B d_in"],
    quantise: Converter | None,
    codes: Float[Array, "d_in d_out"],
    state: ArrayState,
    config: CrossbarConfig,
    key: Array | None,
) -> Float[Array, "B _d_out"]:
    """Return weights times input codes, by the plan's path; see `convert_tiles` for a converter that counts."""
    if state.plan.path == "product":
        return product(n, codes, state, config, key)
    if state.plan.path != "definition":
        assert quantise is not None
        return convert_tiles(n, quantise, state, config, key)
    return definition(n, quantise, state, config, key)
