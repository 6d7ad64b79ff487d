"""The factors of the inputs in the form that the path of a read needs, with the variances of their noise."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ...support.platform import is_traced
from ..config.schema import CrossbarConfig
from ..devices.physical import like
from ..mapping import decoding, encoding
from ..mapping.bit_fields import FLOAT_BITS, INT_BITS, Packed, certify, over_rows, pack
from ..mapping.geometry import Cells, Columns, Flipped, Gains, Geometry
from ..read.conversion_noise import powers
from ..read.kernels.bit_planes import to_planes
from .plan import ON_REQUEST, Plan


class Laid(NamedTuple):
    """Columns that multiply the inputs, in the form that the plan's path needs (see `Chip`)."""

    plan: Plan
    columns: Any = None
    units: Float[Array, "K R rows C"] | None = None
    variance: Float[Array, "..."] | None = None


def lay_out(
    cells: Cells | None,
    slices: Float[Array, "K d_in d_out"],
    flipped: Flipped | None,
    gain: Gains | None,
    geometry: Geometry,
    config: CrossbarConfig,
    plan: Plan,
) -> Laid:
    """Return the columns of cells; without them those of perfect pairs, whose signed digits are in `slices`."""
    if plan.path == "definition":
        return Laid(plan)
    variance = units = None
    if cells is not None and config.device.read_noise is not None:
        variance = decoding.column_variances(powers(cells, geometry, config), geometry, config, gain)
    if plan.path == "product":
        return Laid(plan, variance=None if variance is None else _telescoped(variance, geometry, config))
    if cells is None:
        columns = encoding.split(slices, geometry.rows, 1, front=True)
    else:
        # The cells' values reach the gradient through the codes.
        columns = decoding.columns(jax.lax.stop_gradient(cells), geometry, config, gain)
    if flipped is not None:
        columns, units = decoding.unflipped(columns, flipped, geometry)
    # Squares of halves, and of levels with Gmin, are not integers.
    whole_squares = flipped is None and not config.encoding.two_sided and config.cell.on_off_ratio is None
    if plan.path == "planes":
        columns = to_planes(columns, max(config.weight_slices))
    elif plan.path in ("mosaic", "tables"):
        fit = plan.integers and max(*geometry.levels, geometry.converted_top) < 2**7
        columns = columns.astype(jnp.int8) if fit else columns
    elif plan.integers and (variance is None or variance.shape[3] == 1 or whole_squares):
        columns, variance, plan = _packed(columns, variance, geometry, config, plan)
    elif plan.path == "packed":
        raise ValueError("path='packed' has no room for this noise: leave path out")
    return Laid(plan, columns, units, variance)


def _telescoped(
    variance: Float[Array, "K R rows _cols"], geometry: Geometry, config: CrossbarConfig
) -> Float[Array, "_rows _cols"]:
    """Return the variances of weight codes, given those of every slice's columns."""
    worth = jnp.asarray(geometry.significance, variance.dtype)
    if config.device.read_noise is not None and config.device.read_noise.kind == "independent":
        worth = worth * jnp.asarray(geometry.levels, variance.dtype) / (1 - like(config.g_min, variance))
    of_codes = jnp.einsum("k,krio->rio", jnp.square(worth), variance)
    return encoding.join(of_codes, geometry.rows, 0, front=True)


def _packed(
    columns: Columns, variance: Columns | None, geometry: Geometry, config: CrossbarConfig, plan: Plan
) -> tuple[Packed | Array, Array | None, Plan]:
    """Return integer columns in words, their variances unless these are packed as well, and the plan with its packing.

    A packing is certified by the columns' own sums if these are known, else by the largest sums of any weights. The
    path `loop` becomes `packed` unless it was requested or is equally fast.
    """
    squares = None if variance is None or variance.shape[3] == 1 else variance
    count, top, signed = len(columns), geometry.converted_top, config.signed_inputs

    def largest(cells: Array, power: int) -> list[int]:
        if is_traced(cells):
            levels = geometry.levels * (count // len(geometry.levels))
            return [geometry.tallest * (top * level) ** power for level in levels]
        return [top**power * int(of_slice) for of_slice in np.max(np.asarray(over_rows(cells)), axis=(1, 2))]

    spans = [(1 + signed) * most for most in largest(jnp.abs(columns), 1)]
    word_bits = INT_BITS if plan.path == "lookup" else FLOAT_BITS
    packing = certify(spans, word_bits, () if squares is None else largest(squares, 2))
    if packing is None and plan.path == "packed":
        raise ValueError(f"path='packed': sums of up to {max(spans)} levels do not fit {word_bits} bits")
    if plan.path == "loop":
        if packing is None or plan.reason == ON_REQUEST or config.converts_sums or len(packing.words) == count:
            return columns, variance, plan
        reason = f"{count} conversions come out of {len(packing.words)} products of integers"
        plan = dataclasses.replace(plan, path="packed", reason=reason)
    if packing is None:
        return columns, variance, plan
    packed = pack(columns, packing, top, signed=signed, variances=squares)
    return packed, variance if squares is None else None, dataclasses.replace(plan, packing=packing)
