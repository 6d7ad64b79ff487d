"""The codes of an ADC: a uniform quantiser with one range for each weight slice.

    code = clip(round(f(S / lsb)), qmin, qmax),  round half to even

S is a column's sum in level units (see `mapping.geometry`), and f the transfer curve of the architecture, if it has
one. Signed sums have 2^b - 1 codes about zero, others 2^b from zero. One unit of current is one cell at Gmax under a
full-scale pulse: limits are given in it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ....support.platform import is_traced
from ...config.schema import CrossbarConfig
from ..geometry import Geometry
from .architectures import ARCHITECTURES


class Converter(NamedTuple):
    """The quantiser of every weight slice, in level units.

    An integer sum can lie half-way between two codes, which only exact arithmetic shows: S times a power of two, or the
    remainder of S qmax / span. A quotient does not: XLA's CPU multiplies by the inverse.

    Attributes:
      scale: [R, K], R is 1 where all row tiles have one range; [K] for the kernels. The codes per level unit, or,
        where the converter divides, the sum that the highest code stands for.
      qmin: lowest code, and qmax the highest.
      divides: if true, `scale` is a divisor.
      rounds: False for the smooth surrogate, which only clips.
      transfer: transfer curve of the architecture, or None (see `Architecture`).
      merged: [K, J], codes that a conversion stopped early cannot tell apart, and 0 for one that is left out; None
        where all conversions have all bits.
    """

    scale: Float[Array, "*_R K"]
    qmin: int
    qmax: int
    divides: bool = False
    rounds: bool = True
    transfer: Callable[..., Any] | None = None
    merged: Float[Array, "K J"] | None = None

    @property
    def lsb(self) -> Float[Array, "*_R K"]:
        """Level units that one code stands for."""
        return self.scale / self.qmax if self.divides else 1 / self.scale

    def __call__(
        self,
        sums: Float[Array, "..."],
        scale: Float[Array, "..."],
        merged: Float[Array, "..."] | None = None,
    ) -> Float[Array, "..."]:
        """Return the codes of sums, given the parts of `scale` and `merged` that apply to them."""
        codes = self.scaled(sums, scale)
        if self.rounds:
            codes = jnp.round(codes)
        if self.rounds and self.divides:
            # Half to even, given codes that are at most one off.
            twice = 2 * (sums * self.qmax - codes * scale)
            codes = jnp.where(
                twice > scale, codes + 1, jnp.where(twice < -scale, codes - 1, codes)
            )
            half = (abs(twice) == scale) & (codes != 2 * jnp.round(codes / 2))
            codes = jnp.where(half, codes + jnp.sign(twice), codes)
        codes = jnp.clip(codes, self.qmin, self.qmax)
        if merged is None:
            return codes
        if self.rounds:  # a stopped conversion knows the codes' upper bits: their mean
            steps = jnp.maximum(merged, 1)
            codes = jnp.floor(codes / steps) * steps + (steps - 1) / 2
        return jnp.where(merged > 0, codes, 0)

    def of_slices(
        self, sums: Float[Array, "k B C"], weight_slices: slice, j: Int[Array, ""] | int
    ) -> Float[Array, "k B C"]:
        """Return the codes of some weight slices' sums of input slice j."""
        merged = None
        if self.merged is not None:
            merged = self.merged[weight_slices, j, None, None]
        return self(sums, self.scale[weight_slices, None, None], merged)

    def clips(self, scaled: Float[Array, "..."]) -> Bool[Array, "..."]:
        """Return which sums, in units of a code, are beyond the range."""
        return (scaled > self.qmax + 0.5) | (scaled < self.qmin - 0.5)

    def scaled(
        self, sums: Float[Array, "..."], scale: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Return sums in units of a code, neither rounded nor clipped."""
        scaled = sums * self.qmax / scale if self.divides else sums * scale
        if self.transfer is None:
            return scaled
        return self.transfer(scaled, self.qmin, self.qmax)


def level_units(geometry: Geometry, config: CrossbarConfig) -> tuple[Any, ...]:
    """Return the level units in one unit of the current that is converted, for every weight slice."""
    return tuple(
        geometry.converted_top * top / (1 - config.g_min) for top in geometry.levels
    )


def stacked_units(
    geometry: Geometry, config: CrossbarConfig, dtype: jnp.dtype
) -> Float[Array, " K"]:
    """Return `level_units` as an array."""
    return jnp.asarray(level_units(geometry, config), dtype)


def fixed_limits(
    geometry: Geometry, config: CrossbarConfig, dtype: jnp.dtype
) -> Float[Array, "_R K 2"] | np.ndarray | None:
    """Return the limits that follow from the configuration; None where they are calibrated from data.

    `max` is the rows of each tile; where columns are flipped the largest current of one of them or the unit column,
    Gmin included. (CrossSim rounds it to a power of two for sliced offset encoding.) `granular` is the highest code
    times one level. They are a NumPy array where nothing in them is traced.
    """
    adc = config.adc
    rows = geometry.rows
    if adc is None or geometry.code_range is None or adc.range == "calibrated":
        return None
    xp = jnp if is_traced((adc.limits, config.g_min)) else np
    if adc.range == "given":
        limits = xp.asarray(adc.limits, dtype)
        if limits.ndim == 3 and len(limits) not in (1, len(rows)):
            raise ValueError(
                f"ADC limits of {len(limits)} row tiles, but this matrix has {len(rows)}: give as many"
            )
        return limits[None] if limits.ndim == 2 else limits
    if adc.range == "max":
        heights = (max(rows),) if len(set(rows)) == 1 else rows
        shares = [1.0] * len(geometry.levels)
        if config.encoding.flip:
            cells = [max(0.5, 1 / level) for level in geometry.levels]
            shares = [config.g_min + (1 - config.g_min) * share for share in cells]
        tops = [[height * share for share in shares] for height in heights]
    else:
        top_code = geometry.code_range[1]
        tops = [[top_code / unit for unit in level_units(geometry, config)]]
    top = xp.asarray(tops, dtype)
    return xp.stack([-top if config.signed_sums else 0 * top, top], axis=-1)


# How an integer sum's code is computed exactly: times the inverse of a step that is a power of two, or by a division.
# None for sums that are real numbers, and never half-way between two codes.
Ties = Literal["shift", "divide"] | None


def converter(
    limits: Float[Array, "_R K 2"],
    geometry: Geometry,
    config: CrossbarConfig,
    ties: Ties,
) -> Converter:
    """Return the quantiser that covers `limits`."""
    adc = config.adc
    assert adc is not None and geometry.code_range is not None
    qmin, qmax = geometry.code_range
    span = limits[..., 1] * stacked_units(geometry, config, limits.dtype)[None]
    merged = None
    if isinstance(adc.bits, tuple):
        bits = np.asarray(adc.bits)
        codes = np.where(bits > 0, 2.0 ** (adc.full_bits - bits), 0)
        merged = jnp.asarray(codes, limits.dtype)
    if ties is None:
        transfer = ARCHITECTURES[adc.architecture].transfer
        return Converter(qmax / span, qmin, qmax, transfer=transfer, merged=merged)
    if ties == "divide":
        return Converter(span, qmin, qmax, divides=True, merged=merged)
    step = span / qmax
    fixed = jax.lax.stop_gradient(step)
    # The power of two next to it. Not by `exp2`, which is not exact.
    power = jnp.ldexp(jnp.ones_like(fixed), jnp.frexp(fixed * 1.5)[1] - 1)
    rounding = jnp.where(jnp.abs(power - fixed) < 1e-5 * fixed, power - fixed, 0)
    return Converter(1 / (step + rounding), qmin, qmax, merged=merged)


def are_power_steps(
    limits: np.ndarray, geometry: Geometry, config: CrossbarConfig
) -> bool:
    """Return whether every step of known `limits` [_, K, 2] is a power of two levels."""
    assert geometry.code_range is not None
    units = np.asarray([float(unit) for unit in level_units(geometry, config)])
    steps = limits[..., 1] * units / geometry.code_range[1]
    return bool(np.allclose(np.log2(steps), np.round(np.log2(steps)), atol=1e-6))
