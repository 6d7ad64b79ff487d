"""What a crossbar computes: one tile, one weight slice, one input slice, mapped over all of them.

Short and readable, for every configuration; each faster path is tested against this one. It draws every cell's
read noise at every read.

Axis letters: K weight slices, J input slices, P polarities (1 once subtracted), R row tiles, C column tiles.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from . import encoding
from .config import CrossbarConfig
from .parasitics import currents
from .values import like


def column_sums(
    u: Float[Array, " rows"],
    g: Float[Array, "P rows cols"],
    top: Float[Array, ""],
    key: PRNGKeyArray | None,
    config: CrossbarConfig,
) -> Float[Array, "_P cols"]:
    """Return what one tile's columns bring to the ADC for one weight slice and one input slice.

    Args:
      u: the input slice, in level units, as every sum here.
      g: the cells of each polarity.
      top: the highest level, 2^p - 1.
      key: of this read's noise.
      config: of the crossbar.

    Returns:
      The sums, subtracted unless positive and negative columns are converted each.
    """
    g_min, tile, device = like(config.g_min, g), config.tile, config.device
    subtract = g.shape[0] == 2 and not config.converts_each
    if device.read_noise is not None and key is not None:
        drawn = device.read_noise.draw(g_min + g / top * (1 - g_min), key)
        g = (drawn - g_min) / (1 - g_min) * top
    if tile.wire is None and device.iv is None and tile.current_limit is None:
        if subtract:
            return jnp.dot(u, g[0] - g[1], precision="highest")[None]
        return jnp.einsum("r,prc->pc", u, g, precision="highest") + g_min * top / (1 - g_min) * jnp.sum(u)
    v, conductance = u / encoding.pulse(config), g_min + g / top * (1 - g_min)
    if tile.wire is not None:
        wire = tile.wire
        current = jax.vmap(lambda one: currents(v, one, wire, device.iv))(conductance)
    elif device.iv is not None:
        # Not jnp.sum: see `parasitics.currents`.
        of_cells = device.iv(v[None, :, None], conductance)
        current = jnp.einsum("r,prc->pc", jnp.ones_like(v), of_cells, precision="highest")
    else:
        current = jnp.einsum("r,prc->pc", v, conductance, precision="highest")
    if tile.current_limit is not None:
        current = jnp.clip(current, -like(tile.current_limit, g), like(tile.current_limit, g))
    sums = current * (encoding.pulse(config) * top / (1 - g_min))
    return (sums[0] - sums[1])[None] if subtract else sums


def all_sums(
    codes: Float[Array, "R rows"],
    cells: Float[Array, "K P R C rows cols"],
    key: PRNGKeyArray | None,
    config: CrossbarConfig,
) -> Float[Array, "J K R C _P cols"]:
    """Return the column sums of one input vector in every tile, for every pair of slices.

    Args:
      codes: input codes, cut into row tiles.
      cells: in level units.
      key: of the read noise; every tile and pair of slices draws its own.
      config: of the crossbar.
    """
    pulses = encoding.pulses(codes, config)  # [J, R, rows]
    tops = jnp.asarray(encoding.levels(config), codes.dtype)
    keys = None
    if key is not None:
        slices, _, row_tiles, column_tiles = cells.shape[:4]
        keys = jax.random.split(key, (len(config.input_slices), slices, row_tiles, column_tiles))

    def tile(u: Array, g: Array, top: Array, key: Array | None) -> Array:
        return column_sums(u, g, top, key, config)

    along_key = None if keys is None else 0
    over_column_tiles = jax.vmap(tile, in_axes=(None, 1, None, along_key))
    over_row_tiles = jax.vmap(over_column_tiles, in_axes=(0, 1, None, along_key))
    over_weight_slices = jax.vmap(over_row_tiles, in_axes=(None, 0, 0, along_key))
    over_input_slices = jax.vmap(over_weight_slices, in_axes=(0, None, None, along_key))
    return over_input_slices(pulses, cells, tops, keys)


def shift_and_add(
    sums: Float[Array, "J K R C _P cols"],
    convert: Callable[[Array], Array] | None,
    config: CrossbarConfig,
) -> Float[Array, "K R C _P cols"]:
    """Return the sum over input slices, converted before or after it.

    Args:
      sums: of every conversion, in level units.
      convert: the ADC, from sums [..., K, R, C, P, cols] to codes; None for an ideal one.
      config: of the crossbar.
    """
    weights = jnp.asarray(encoding.pulse_significance(config), sums.dtype)
    if convert is not None and config.adc is not None and config.adc.convert == "slice":
        return jnp.einsum("j,jkrcpo->krcpo", weights, convert(sums))
    total = jnp.einsum("j,jkrcpo->krcpo", weights, sums)
    return total if convert is None else convert(total)
