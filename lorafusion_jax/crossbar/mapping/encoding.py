"""Encoding of weights as cells and of inputs as pulses, in integers.

With B weight bits, p bits of a slice, s bits of an input slice and M the full scale,

    differential:  q = round(w / M (2^(B-1) - 1)); the base-2^p digits of |q| go to the positive or negative array
    offset:        the digits of q + 2^(B-1)
    input:         n = round(|x| / limit (2^m - 1)), slice k = sign(x) ((n >> s k) mod 2^s), m magnitude bits

The rules are those of CrossSim 3.2 (Sandia). Slices run from the least significant.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..config.schema import CrossbarConfig
from .geometry import Cells, Codes, Flipped, Geometry

_ROUNDING = (
    2**31
)  # purpose of a read's key, in addition to the numbers of its row tiles


def split(x: Array, parts: tuple[int, ...], axis: int, *, front: bool = False) -> Array:
    """Cut an axis into parts, zero-padded to the longest: [..., d, ...] -> [..., parts, longest, ...].

    Rows are padded in `front`: those in use are next to the converters at the bottom.
    """
    axis %= x.ndim
    longest = max(parts)
    if len(set(parts)) == 1:
        return x.reshape(*x.shape[:axis], len(parts), longest, *x.shape[axis + 1 :])
    pieces = []
    for piece in jnp.split(x, np.cumsum(parts[:-1]), axis):
        widths = np.zeros((x.ndim, 2), int)
        widths[axis, 0 if front else 1] = longest - piece.shape[axis]
        pieces.append(jnp.pad(piece, widths))
    return jnp.stack(pieces, axis=axis)


def join(x: Array, parts: tuple[int, ...], axis: int, *, front: bool = False) -> Array:
    """Undo `split`: [..., parts, longest, ...] -> [..., d, ...], `axis` being that of the parts."""
    axis %= x.ndim
    longest = max(parts)
    if len(set(parts)) == 1:
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    cut = []
    for piece, part in zip(jnp.unstack(x, axis=axis), parts, strict=True):
        start = longest - part if front else 0
        cut.append(jax.lax.slice_in_dim(piece, start, start + part, axis=axis))
    return jnp.concatenate(cut, axis=axis)


def per_slice(
    values: tuple[float | int, ...], arrays: Float[Array, "K ..."]
) -> Float[Array, "K ..."]:
    """Return a number for each weight slice in a shape that broadcasts to arrays."""
    return jnp.asarray(values, arrays.dtype).reshape(-1, *[1] * (arrays.ndim - 1))


def full_scale(
    weights: Codes,
    geometry: Geometry,
    config: CrossbarConfig,
    ranges: Float[Array, " d_out"] | None = None,
) -> Float[Array, "_R _cols"]:
    """Return M for every row tile and column, of shape [1, 1], [1, d_out] or, for scale `tile`, [R, d_out].

    Columns may have chosen `ranges`.
    """

    def largest(values: Array, axis: tuple[int, ...]) -> Array:
        top = jnp.max(values, axis=axis, keepdims=True)
        if config.mapping.quantile == 1:
            return top
        covered = jnp.quantile(
            values, config.mapping.quantile, axis=axis, keepdims=True
        )
        return jnp.where(covered > 0, covered, top)  # weights that are mostly zeros

    magnitude = jnp.abs(weights)
    if ranges is not None:
        scale = ranges[None].astype(weights.dtype)
    elif config.mapping.scale == "matrix":
        scale = largest(magnitude, (0, 1))
    elif config.mapping.scale == "column":
        scale = largest(magnitude, (0,))
    else:
        edges = np.cumsum(geometry.cols[:-1])
        bands = jnp.split(magnitude, np.cumsum(geometry.rows[:-1]))
        tops = [
            [
                jnp.broadcast_to(largest(tile, (0, 1)), (1, tile.shape[1]))
                for tile in jnp.split(band, edges, axis=1)
            ]
            for band in bands
        ]
        scale = jnp.block(tops)
    # The weight of one code must not underflow: it is at least about the smallest normal number, in fewer codes.
    least = 1.0001 * float(jnp.finfo(scale.dtype).tiny)
    fewer = geometry.code_scale * (scale / jnp.floor(jnp.maximum(scale / least, 1)))
    scale = jnp.where(scale >= geometry.code_scale * least, scale, fewer)
    return jnp.where(scale > 0, scale, jnp.ones_like(scale))


def per_weight(scale: Float[Array, "_R _cols"], geometry: Geometry) -> Array:
    """Return `scale` in a shape that broadcasts to a [d_in, d_out] matrix."""
    if scale.shape[0] == 1:
        return scale
    bands = [
        jnp.broadcast_to(tile, (height, len(tile)))
        for tile, height in zip(scale, geometry.rows, strict=True)
    ]
    return jnp.concatenate(bands)


def weight_codes(
    weights: Codes,
    scale: Float[Array, "_R _cols"],
    geometry: Geometry,
    config: CrossbarConfig,
) -> Codes:
    """Return the signed weight codes q: integers, or w / M in [-1, 1] for real-valued weights."""
    codes = weights / per_weight(scale, geometry)
    if config.mapping.weight_bits is not None:
        codes = jnp.round(codes)
    top = geometry.code_scale
    clips = config.mapping.quantile < 1 or config.mapping.clip == "optimal"
    return jnp.clip(codes, -top, top) if clips else codes


def digit(
    n: Float[Array, "*S"], slices: tuple[int, ...], j: int | Int[Array, ""]
) -> Int[Array, "*S"]:
    """Return slice j of integer codes n: sign(n) ((|n| >> start) mod 2^bits)."""
    start = jnp.asarray([sum(slices[:i]) for i in range(len(slices))], jnp.int32)[j]
    bits = jnp.asarray(slices, jnp.int32)[j]
    magnitude = (jnp.abs(n).astype(jnp.int32) >> start) & ((1 << bits) - 1)
    return jnp.where(n < 0, -magnitude, magnitude)


def _all_digits(
    n: Float[Array, "*S"], slices: tuple[int, ...]
) -> Float[Array, "slices *S"]:
    return jnp.stack([digit(n, slices, j) for j in range(len(slices))]).astype(n.dtype)


def digits(
    codes: Float[Array, "rows d_out"], geometry: Geometry, config: CrossbarConfig
) -> Float[Array, "K rows d_out"]:
    """Return the digits of every weight slice: signed for differential encoding, 0 .. 2^p - 1 for offset."""
    offset = config.encoding.kind == "offset"
    if config.cell.bits is None and config.cell.residual:
        return jnp.stack([jnp.zeros_like(codes), codes])
    if config.cell.bits is None:
        return ((codes + 1) / 2 if offset else codes)[None]
    return _all_digits(
        codes + geometry.offset if offset else codes, config.weight_slices
    )


def polarities(
    digits: Float[Array, "K *S"], top: Array, config: CrossbarConfig
) -> Float[Array, "K P *S"]:
    """Return the levels of the positive and the negative cell of signed digits."""
    if config.encoding.two_sided:
        return jnp.stack([top / 2 + digits / 2, top / 2 - digits / 2], axis=1)
    return jnp.stack([jnp.maximum(digits, 0), jnp.maximum(-digits, 0)], axis=1)


def in_tiles(
    values: Float[Array, "*S d_in d_out"], geometry: Geometry
) -> Float[Array, "*S R C rows cols"]:
    """Return a matrix, cut into tiles."""
    tiles = split(
        split(values, geometry.cols, axis=-1), geometry.rows, axis=-3, front=True
    )  # [..., R, rows, C, cols]
    return jnp.moveaxis(tiles, -2, -3)


def to_arrays(
    slices: Float[Array, "K d_in d_out"], geometry: Geometry, config: CrossbarConfig
) -> tuple[Cells, Flipped | None]:
    """Return the target level of every cell of the arrays, a unit column last, and which columns are flipped."""
    if config.encoding.kind == "differential":
        both = polarities(slices, per_slice(geometry.levels, slices), config)
    else:
        both = slices[:, None]
    arrays = in_tiles(both, geometry)
    flipped = None
    if config.encoding.flip:
        sums = jnp.sum(arrays[:, 0], axis=3)
        rows = jnp.asarray(geometry.rows, slices.dtype)[None, :, None, None]
        flipped = 2 * sums > rows * per_slice(geometry.levels, sums)
        inverted = flipped[:, None, :, :, None, :] & geometry.cells_in_use[None, None]
        arrays = jnp.where(
            inverted, per_slice(geometry.levels, arrays) - arrays, arrays
        )
    if config.encoding.unit_column:
        unit = per_slice(geometry.unit_levels, arrays)
        arrays = jnp.concatenate(
            [arrays, jnp.broadcast_to(unit, (*arrays.shape[:5], 1))], axis=5
        )
    return arrays, flipped


def input_codes(
    x: Float[Array, "B d_in"],
    limit: Array,
    geometry: Geometry,
    config: CrossbarConfig,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "B d_in"]:
    """Return the signed input codes n, given the full scale [] or [B, 1], or for an ideal DAC x / limit itself."""
    if config.dac is None:
        return x / limit
    top = float(geometry.input_top)
    codes = x / limit * top
    if config.dac.rounding == "nearest" or key is None:
        rounded = jnp.round(codes)
    else:
        rounded = jnp.floor(
            codes
            + jax.random.uniform(
                jax.random.fold_in(key, _ROUNDING), codes.shape, codes.dtype
            )
        )
    return jnp.clip(rounded, -top if config.dac.signed else 0.0, top)


def pulses(codes: Float[Array, "*B d"], geometry: Geometry) -> Float[Array, "J *B d"]:
    """Return the input slices u of input codes."""
    if geometry.input_slices is None:
        return codes[None]
    return _all_digits(codes, geometry.input_slices)
