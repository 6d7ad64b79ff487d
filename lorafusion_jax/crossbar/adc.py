"""The ADC: a uniform quantiser with one range for each weight slice.

    code = clip(round(S / lsb), qmin, qmax),  round half to even

S is a column's sum in level units (see `encoding`). Signed sums have 2^b - 1 codes about zero, others 2^b from
zero. One unit of current is one cell at Gmax under a full-scale pulse: limits are given in it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import encoding
from .config import CrossbarConfig
from .values import is_traced


class Converter(NamedTuple):
    """The quantiser of every weight slice, in level units.

    Attributes:
      inv_lsb: [R, K] codes per level unit; R is 1 where all row tiles have one range. [K] for the kernels.
      qmin: lowest code.
      qmax: highest code.
      rounds: False for the smooth surrogate, which only clips.
    """

    inv_lsb: Float[Array, "*_R K"]
    qmin: int
    qmax: int
    rounds: bool = True

    def __call__(self, sums: Float[Array, "..."], inv_lsb: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the codes of sums, given the part of `inv_lsb` that applies to them."""
        scaled = sums * inv_lsb
        return jnp.clip(jnp.round(scaled) if self.rounds else scaled, self.qmin, self.qmax)


def level_units(config: CrossbarConfig) -> tuple[Any, ...]:
    """Return the level units in one unit of the current that is converted, for every weight slice."""
    return tuple(encoding.converted_top(config) * top / (1 - config.g_min) for top in encoding.levels(config))


def codes(config: CrossbarConfig) -> tuple[int, int]:
    """Return the lowest and the highest code."""
    assert config.adc is not None
    if config.signed_sums:
        top = 2 ** (config.adc.bits - 1) - 1
        return -top, top
    return 0, 2**config.adc.bits - 1


def fixed_limits(config: CrossbarConfig, rows: tuple[int, ...], dtype: jnp.dtype) -> Array | np.ndarray | None:
    """Return the limits that follow from the configuration; None where they are calibrated from data.

    `max` is the rows of each tile, halved where flipped columns halve what an array produces. (CrossSim rounds it to
    a power of two for sliced offset encoding.) `granular` is the highest code times one level.

    Args:
      config: of the crossbar.
      rows: of every row tile.
      dtype: of the limits.

    Returns:
      [1 or R, K, 2]; a NumPy array where nothing in it is traced.
    """
    adc = config.adc
    if adc is None or adc.range == "calibrated":
        return None
    if adc.range == "given":
        given = (jnp if is_traced(adc.limits) else np).asarray(adc.limits, dtype)
        if given.ndim == 3 and len(given) not in (1, len(rows)):
            raise ValueError(
                f"ADC limits of {len(given)} row tiles, but these weights take {len(rows)}: give one range for all, "
                f"[slices, 2], or [{len(rows)}, slices, 2]"
            )
        return given[None] if given.ndim == 2 else given
    if adc.range == "max":
        share = 2 if config.encoding.flip else 1
        heights = (max(rows),) if len(set(rows)) == 1 else rows
        top = np.asarray([[height / share for _ in config.weight_slices] for height in heights], dtype)
    else:
        units = level_units(config)
        if any(isinstance(unit, jax.Array) for unit in units):
            top = jnp.stack([codes(config)[1] / jnp.asarray(unit, dtype) for unit in units])[None]
        else:
            top = np.asarray([[codes(config)[1] / unit for unit in units]], dtype)
    stack = jnp.stack if isinstance(top, jax.Array) else np.stack
    return stack([-top if config.signed_sums else 0 * top, top], axis=-1)


def converter(limits: Float[Array, "_R K 2"], config: CrossbarConfig) -> Converter:
    """Return the quantiser that covers `limits`."""
    qmin, qmax = codes(config)
    units = jnp.stack([jnp.asarray(u, limits.dtype) for u in level_units(config)])
    return Converter(qmax / (limits[..., 1] * units[None]), qmin, qmax)
