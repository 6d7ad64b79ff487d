"""Packing of integer columns into words: the choice of a valid packing, and the words themselves.

A packing is certified by the columns' own sums if these are known, else by the largest sums of any weights.

Axis letters: K weight slices, k conversions of a pair of slices (K, or 2 K where both polarities are converted), R row
tiles.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..config.schema import CrossbarConfig
from ..devices.physical import is_traced
from ..mapping import encoding
from ..mapping.bit_fields import FLOAT_BITS, INT_BITS, Packed, certify, extent, pack, pack_codes
from ..mapping.geometry import Geometry
from .plan import Plan


def pack_columns(
    columns: Float[Array, "k R rows _cols"],
    variance: Float[Array, "k R rows _cols"] | None,
    geometry: Geometry,
    config: CrossbarConfig,
    plan: Plan,
    *,
    asked: bool,
) -> tuple[Packed | Array, Array | None, Plan]:
    """Return columns in words, and their variances unless these are packed as well.

    Columns are not packed if the path is `loop` and it was requested or is equally fast.

    Args:
      variance: variance of read noise; integers, or one column for all.
      asked: the plan's path was requested by the caller.
    """
    squares = None if variance is None or variance.shape[3] == 1 else variance
    top, signed = geometry.converted_top, config.signed_inputs
    low, high = extent(columns, top, signed=signed)
    most = None if squares is None else top**2 * jnp.sum(squares, axis=2)
    plan = _certified(plan, high - low, most, geometry, config, asked=asked)
    if plan.packing is None:
        return columns, variance, plan
    packed = pack(columns, plan.packing, top, signed=signed, variances=squares)
    return packed, variance if squares is None else None, plan


def pack_pairs(
    codes: Float[Array, "d_in d_out"], geometry: Geometry, config: CrossbarConfig, plan: Plan, *, asked: bool
) -> tuple[Packed | Array, Plan]:
    """Return perfect differential weights in words, as `pack_columns` does."""
    top, signed = geometry.converted_top, config.signed_inputs
    tiles = encoding.split(codes, geometry.rows, 0, front=True)

    def span(tile: Float[Array, "rows d_out"]) -> Float[Array, "K d_out"]:
        low, high = extent(encoding.digits(tile, geometry, config)[:, None], top, signed=signed)
        return (high - low)[:, 0]

    spans = jnp.moveaxis(jax.lax.map(span, tiles), 0, 1)
    plan = _certified(plan, spans, None, geometry, config, asked=asked)
    packing = plan.packing
    if packing is None:
        return encoding.split(encoding.digits(codes, geometry, config), geometry.rows, 1, front=True), plan
    return pack_codes(tiles, config.weight_slices, packing, top, signed=signed), plan


def _certified(
    plan: Plan,
    spans: Float[Array, "k R _cols"],
    most: Float[Array, "k R _cols"] | None,
    geometry: Geometry,
    config: CrossbarConfig,
    *,
    asked: bool,
) -> Plan:
    """Return the plan with its packing, with the path `packed` if a product holds more than one slice.

    Args:
      spans: difference of the largest and the least sum of every column.
      most: largest sum of its variances, or None.
    """
    count, top, rows = len(spans), geometry.converted_top, geometry.tallest
    if is_traced((spans, most)):
        level = np.asarray(geometry.levels * (count // len(geometry.levels)))
        span = level * rows * top * (1 + (config.signed_inputs or config.encoding.kind == "differential"))
        squares = level**2 * rows * top**2
    else:
        span = np.max(np.asarray(spans), axis=(1, 2))
        squares = span if most is None else np.max(np.asarray(most), axis=(1, 2))
    word_bits = INT_BITS if plan.path == "lookup" else FLOAT_BITS
    packing = certify(tuple(int(v) for v in span), word_bits, () if most is None else tuple(int(v) for v in squares))
    if packing is None and plan.path == "packed":
        raise ValueError(f"path='packed': sums of up to {max(span):.0f} levels do not fit {word_bits} bits")
    if plan.path == "loop":
        if packing is None or asked or config.converts_sums or len(packing.words) == count:
            return plan
        reason = f"{count} conversions come out of {len(packing.words)} products of integers"
        return dataclasses.replace(plan, path="packed", reason=reason, packing=packing)
    return dataclasses.replace(plan, packing=packing)
