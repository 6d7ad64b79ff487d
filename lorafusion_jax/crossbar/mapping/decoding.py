"""Decoding: from cells to the weight codes of their columns, and from conversions to the product.

The sum of a column at the ADC is sum_rows u (g + kappa), with kappa = Gmin in level units. Its value follows by
subtracting Gmin and the offset, which are computed from the inputs (digital) or measured by the array's unit column.
This is linear: the same rule recovers sums from conversions and weight codes from cells.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..config.schema import CrossbarConfig
from . import encoding
from .adc.quantiser import Converter
from .geometry import Cells, Codes, Columns, Flipped, Gains, Geometry


def kappa(
    geometry: Geometry, config: CrossbarConfig, arrays: Float[Array, "K ..."]
) -> Float[Array, "K ..."]:
    """Return Gmin in the level units of every weight slice, in a shape that broadcasts to arrays."""
    g_min = jnp.asarray(config.g_min, arrays.dtype)
    return g_min / (1 - g_min) * encoding.per_slice(geometry.levels, arrays)


def recover(
    columns: Float[Array, "K *S cols"],
    ones: Float[Array, "*#S 1"],
    flipped: Bool[Array, "K *#S _cols"] | None,
    geometry: Geometry,
    config: CrossbarConfig,
) -> Float[Array, "K *S _cols"]:
    """Return the values of columns in offset encoding; their weighted sum over K is the signed result.

    The columns are measured sums, Gmin included, with the unit column last; `ones` is the sum of the inputs.
    """
    gmin = kappa(geometry, config, columns)
    zero = encoding.per_slice(geometry.zero_digits, columns)
    if not config.encoding.unit_column:
        return columns - (gmin + zero) * ones[None]
    values = columns[..., :-1]
    unit = columns[..., -1:]
    if flipped is None:  # the unit column holds the zero digits and the same Gmin
        return values - unit
    ones = unit / (1 + gmin)
    top = encoding.per_slice(geometry.levels, columns)
    values = values - gmin * ones
    return jnp.where(flipped, top * ones - values, values) - zero * ones


def programmed_codes(
    cells: Cells, flipped: Flipped | None, geometry: Geometry, config: CrossbarConfig
) -> Codes:
    """Return the weight codes of cells: the sums of a perfect read."""
    if config.encoding.kind == "differential":
        slices = cells[:, 0] - cells[:, 1]
    else:
        columns = cells[:, 0] + kappa(geometry, config, cells[:, 0])
        ones = jnp.ones((1, 1, 1, 1), cells.dtype)
        of_rows = None if flipped is None else flipped[:, :, :, None]
        slices = recover(columns, ones, of_rows, geometry, config)
    weights = jnp.asarray(geometry.significance, cells.dtype)
    codes = jnp.einsum("k,krcio->rcio", weights, slices, precision="highest")
    codes = encoding.join(jnp.moveaxis(codes, 1, 2), geometry.rows, 0, front=True)
    return encoding.join(codes, geometry.cols, 1)


def columns(
    cells: Cells, geometry: Geometry, config: CrossbarConfig, gain: Gains | None = None
) -> Columns:
    """Return the factors of the inputs, one entry for each conversion; unit columns come after all others."""
    if config.encoding.kind == "differential" and not config.converts_each:
        converted = (cells[:, 0] - cells[:, 1])[:, None]
    else:
        converted = cells + kappa(geometry, config, cells)
    return _side_by_side(
        converted if gain is None else converted * gain[..., None, :], geometry, config
    )


def column_variances(
    variances: Float[Array, "K P R C rows _cols"],
    geometry: Geometry,
    config: CrossbarConfig,
    gain: Gains | None = None,
) -> Columns:
    """Return the variances of the result of `columns`, given those of the cells; one column may stand for all."""
    if config.encoding.kind == "differential" and not config.converts_each:
        variances = (variances[:, 0] + variances[:, 1])[:, None]
    return _side_by_side(
        variances if gain is None else variances * jnp.square(gain)[..., None, :],
        geometry,
        config,
    )


def _side_by_side(
    converted: Cells, geometry: Geometry, config: CrossbarConfig
) -> Columns:
    cols = geometry.cols
    converted = jnp.concatenate(list(jnp.moveaxis(converted, 1, 0)))
    if converted.shape[4] == 1 < max(cols):
        return converted[:, :, 0]
    values = encoding.join(jnp.moveaxis(converted, 2, 3)[..., : max(cols)], cols, 3)
    if not config.encoding.unit_column:
        return values
    return jnp.concatenate([values, converted[..., -1].swapaxes(2, 3)], axis=3)


def with_left_out(
    total: Float[Array, "K A C cols"],
    n: Float[Array, "A R rows"],
    quantise: Converter,
    geometry: Geometry,
    config: CrossbarConfig,
) -> Float[Array, "K A C cols"]:
    """Return the codes with the mean of the conversions that are left out, as if all levels were equally frequent.

    The mean is zero in differential encoding. `n` are the input codes of each sum's row tiles.
    """
    if quantise.merged is None or config.encoding.kind == "differential":
        return total
    inputs = jnp.sum(encoding.pulses(n, geometry), axis=(2, 3))
    worth = jnp.asarray(geometry.input_significance, n.dtype)
    left_out = jnp.where(quantise.merged == 0, worth, 0) @ inputs  # [K, A]
    levels = jnp.asarray(geometry.levels, n.dtype)[:, None] / 2
    means = jnp.broadcast_to(levels, (len(levels), total.shape[3]))
    if config.encoding.unit_column:
        means = means.at[:, -1].set(jnp.asarray(geometry.unit_levels, n.dtype))
    means = means + kappa(geometry, config, means)
    lsb = quantise.lsb.T[:, :, None, None]
    return total + left_out[:, :, None, None] * means[:, None, None] / lsb


def finish(
    total: Float[Array, "K A C cols"],
    ones: Float[Array, "#A 1 1"],
    quantise: Converter | None,
    flipped: Flipped | None,
    geometry: Geometry,
    config: CrossbarConfig,
) -> Float[Array, "A d_out"]:
    """Return the weighted sum over weight slices, in weight codes times input codes.

    `total` has the codes, or sums without an ADC, with unit columns last, and `ones` the sums of the inputs.
    """
    lsb = None if quantise is None else quantise.lsb
    if config.encoding.kind == "offset" and (
        flipped is not None or not config.encoding.unit_column
    ):
        if lsb is not None:
            total = total * lsb.T[:, :, None, None]
        return weigh(recover(total, ones, flipped, geometry, config), None, geometry)
    if config.encoding.unit_column:
        total = total[..., :-1] - total[..., -1:]
    return weigh(total, lsb, geometry)


def weigh(
    slices: Float[Array, "K A C cols"],
    lsb: Float[Array, "_R K"] | None,
    geometry: Geometry,
) -> Float[Array, "A d_out"]:
    """Return the sum over weight slices, each times the value of its level (or of its code, given `lsb`)."""
    worth = jnp.asarray(geometry.significance, slices.dtype)[None]
    if lsb is not None:
        worth = worth * lsb
    # Powers of two times integers add up exactly in any order; what is left is one factor.
    shares = (worth / worth[:, :1]).T[:, :, None, None]
    total = sum(share * codes for share, codes in zip(shares, slices, strict=True))
    return encoding.join(total * worth[:, 0, None, None], geometry.cols, axis=1)
