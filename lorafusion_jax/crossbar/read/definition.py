"""The definition of a crossbar's result: one tile, weight slice and input slice, mapped over all of them.

The code is short and handles every configuration; each faster path is tested against it. It draws every cell's read
noise at every read, and computes as much at a time as fits `BUDGET`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ...support.platform import for_cpu
from ..chip.chip import Chip
from ..chip.plan import ColumnLayout, ProgrammedCells, ReadRequirements
from ..config.schema import CrossbarConfig
from ..devices.normal_draws import normal
from ..devices.physical import for_each_cell, like
from ..devices.wires import currents
from ..mapping import encoding
from ..mapping.adc.quantiser import Converter
from ..mapping.decoding import finish, with_left_out
from ..mapping.geometry import Cells, Geometry
from .conversion_noise import of_conversions


class ReadPath:
    """One way to compute a read; the fastest of those that are exact is chosen.

    Attributes:
      name: the path in plans, files and `program(path=...)`.
      converts: column sums are converted; False where slices and tiles telescope.
      single_cells: the chip keeps every cell.
    """

    name: str
    converts = True
    single_cells = False

    def refusal(self, requirements: ReadRequirements) -> str | None:
        """Return the reason why the path cannot compute a read exactly, or None."""
        return None

    def chosen(self, requirements: ReadRequirements) -> str | None:
        """Return the reason why the path is the fastest, if no earlier one in the registry is; else None."""
        return None

    def lay_out(self, programmed: ProgrammedCells) -> ColumnLayout:
        """Return the columns in the form that the read needs."""
        return ColumnLayout(programmed.plan)

    def read(
        self, n: Float[Array, "B d_in"], quantise: Converter | None, chip: Chip
    ) -> Float[Array, "B d_out"]:
        """Return weights times input codes."""
        raise NotImplementedError


BUDGET = 256 * 2**20  # bytes that the temporaries of one read may take
# Copies of an array's cells in memory at once: of drawn or nonlinear ones, and while wires are solved for.
_CELL_COPIES = 4
_WIRE_COPIES = 12
_CONVERSION = 2**31  # purpose of an input vector's key, in addition to its cells' noise


class DefinitionPath(ReadPath):
    """Reads every cell; it can do everything."""

    name = "definition"
    single_cells = True

    def chosen(self, requirements: ReadRequirements) -> str | None:
        if requirements.unlike_products:
            return f"every conversion separately: {requirements.unlike_products}"
        if not for_cpu() and not requirements.config.draws_at_conversion:
            return "every conversion separately, batched: fastest on an accelerator"
        return None

    def read(
        self, n: Float[Array, "B d_in"], quantise: Converter | None, chip: Chip
    ) -> Float[Array, "B d_out"]:
        return definition(n, quantise, chip)


def column_sums(
    u: Float[Array, " rows"],
    g: Float[Array, "P rows cols"],
    top: Float[Array, ""],
    key: PRNGKeyArray | None,
    geometry: Geometry,
    config: CrossbarConfig,
    *,
    integers: bool = False,
) -> Float[Array, "_P cols"]:
    """Return the column sums of one tile at the ADC, for one weight slice of highest level `top` and one input slice.

    They are in level units, and subtracted unless positive and negative columns are converted separately. `integers` is
    true if both factors are, unless noise is drawn.
    """
    g_min = like(config.g_min, g)
    tile = config.tile
    device = config.device
    subtract = g.shape[0] == 2 and not config.converts_each
    # bfloat16 has all integers up to 256. Accelerators multiply them in one pass, and add up exactly in float32.
    bits = max(*config.weight_slices, *config.input_slices)
    narrow = integers and bits <= 8 and u.dtype == jnp.float32 and not for_cpu()
    if device.read_noise is not None and key is not None:
        narrow = False
        noisy = device.read_noise.draw(g_min + g / top * (1 - g_min), key)
        g = (noisy - g_min) / (1 - g_min) * top
    if tile.wire is None and device.iv is None and tile.current_limit is None:
        precision: Any = (
            {"preferred_element_type": u.dtype} if narrow else {"precision": "highest"}
        )
        dtype = jnp.bfloat16 if narrow else u.dtype
        if subtract:
            return jnp.dot(u.astype(dtype), (g[0] - g[1]).astype(dtype), **precision)[
                None
            ]
        sums = jnp.einsum("r,prc->pc", u.astype(dtype), g.astype(dtype), **precision)
        return sums + g_min * top / (1 - g_min) * jnp.sum(u)
    v = u / geometry.pulse
    conductance = g_min + g / top * (1 - g_min)
    if tile.wire is not None:
        wire = tile.wire
        current = jax.vmap(lambda one: currents(v, one, wire, device.iv))(conductance)
    elif device.iv is not None:
        # Not jnp.sum: see `devices.wires.currents`.
        cell_powers = for_each_cell(
            "iv", device.iv(v[None, :, None], conductance), conductance.shape
        )
        current = jnp.einsum(
            "r,prc->pc", jnp.ones_like(v), cell_powers, precision="highest"
        )
    else:
        current = jnp.einsum("r,prc->pc", v, conductance, precision="highest")
    if tile.current_limit is not None:
        current = jnp.clip(
            current, -like(tile.current_limit, g), like(tile.current_limit, g)
        )
    sums = current * (geometry.pulse * top / (1 - g_min))
    return (sums[0] - sums[1])[None] if subtract else sums


def all_sums(
    codes: Float[Array, "R rows"],
    cells: Cells,
    key: PRNGKeyArray | None,
    geometry: Geometry,
    config: CrossbarConfig,
    *,
    integers: bool = False,
) -> Float[Array, "J K R C _P cols"]:
    """Return the column sums of one input vector in every tile, for every pair of slices, each with separate noise."""
    pulses = encoding.pulses(codes, geometry)  # [J, R, rows]
    tops = jnp.asarray(geometry.levels, codes.dtype)
    sizes = (len(pulses), cells.shape[0], *cells.shape[2:4])
    keys, along_key = (None, None) if key is None else (jax.random.split(key, sizes), 0)

    def sums(u: Array, g: Array, top: Array, key: Array | None) -> Array:
        return column_sums(u, g, top, key, geometry, config, integers=integers)

    over = sums
    bytes_each = _tile_bytes(cells, config)
    along = (
        (None, 1, None),
        (0, 1, None),
        (None, 0, 0),
        (0, None, None),
    )  # column tiles first, input slices last
    for axes, size in zip(along, reversed(sizes), strict=True):
        over, bytes_each = mapped(over, (*axes, along_key), size, bytes_each)
    return over(pulses, cells, tops, keys)


def input_bytes(cells: Cells, config: CrossbarConfig) -> int:
    """Return the bytes of temporaries that `all_sums` takes, unless they exceed the budget."""
    return (
        len(config.input_slices)
        * len(cells)
        * math.prod(cells.shape[2:4])
        * _tile_bytes(cells, config)
    )


def mapped(
    fn: Callable[..., Any], in_axes: tuple[int | None, ...], size: int, bytes_each: int
) -> tuple[Callable[..., Any], int]:
    """Return `fn` over an axis, all at once or as many at a time as the budget allows, and the bytes that it takes."""
    if size * bytes_each <= BUDGET:
        return jax.vmap(fn, in_axes=in_axes), size * bytes_each

    def in_turn(*arguments: Any) -> Any:
        def one(i: Array) -> Any:
            parts = [
                a
                if axis is None
                else jax.lax.dynamic_index_in_dim(a, i, axis, keepdims=False)
                for a, axis in zip(arguments, in_axes, strict=True)
            ]
            return fn(*parts)

        return jax.lax.map(
            one, jnp.arange(size), batch_size=max(1, BUDGET // bytes_each)
        )

    return in_turn, max(BUDGET, bytes_each)


def _tile_bytes(cells: Cells, config: CrossbarConfig) -> int:
    """Return the bytes of temporaries that one call of `column_sums` takes."""
    _, polarities, _, _, rows, cols = cells.shape
    columns = polarities * cols * cells.dtype.itemsize
    if config.tile.wire is not None:
        return columns * rows * _WIRE_COPIES
    single = config.device.iv is not None or config.device.read_noise is not None
    return columns * rows * _CELL_COPIES if single else columns


def definition(
    n: Float[Array, "B d_in"], quantise: Converter | None, chip: Chip
) -> Float[Array, "B d_out"]:
    """Return weights times input codes."""
    geometry = chip.geometry
    config = chip.config
    cells = chip.cells
    key = chip.key
    assert cells is not None
    tiles = encoding.split(n, geometry.rows, axis=1, front=True)
    keys = None if key is None else jax.random.split(key, n.shape[0])

    def of_one(codes: Array, key: Array | None) -> Array:
        def converted(sums: Array) -> Array:
            if quantise is None:
                return sums
            scale = jnp.broadcast_to(
                quantise.scale.T[:, :, None, None, None], sums.shape
            )
            merged = None
            if quantise.merged is not None:
                merged = quantise.merged.T[:, :, None, None, None, None]
            noisy = with_noise(with_mismatch(sums, chip), geometry, config, key)
            return quantise(noisy, scale, merged)

        sums = all_sums(
            codes, cells, key, geometry, config, integers=chip.plan.integers
        )
        sums = sums if config.converts_sums else converted(sums)
        total = jnp.einsum(
            "j,jkrcpo->krcpo",
            jnp.asarray(geometry.input_significance, sums.dtype),
            sums,
        )
        total = converted(total) if config.converts_sums else total
        if total.shape[3] == 2:
            total = total[..., 0, :] - total[..., 1, :]
        else:
            total = total[..., 0, :]
        ones = jnp.sum(codes, axis=1)[:, None, None]
        if quantise is not None:
            rows = codes[:, None]
            total = with_left_out(total, rows, quantise, geometry, config)
        one_range = quantise is None or quantise.scale.shape[0] == 1
        if chip.flipped is None and chip.scale.shape[0] == 1 and one_range:
            total = jnp.sum(total, axis=1, keepdims=True)
            ones = jnp.sum(ones, axis=0, keepdims=True)
        return jnp.sum(
            finish(total, ones, quantise, chip.flipped, geometry, config) * chip.scale,
            axis=0,
        )

    over_inputs, _ = mapped(
        of_one, (0, None if keys is None else 0), n.shape[0], input_bytes(cells, config)
    )
    return over_inputs(tiles, keys)


def with_mismatch(
    sums: Float[Array, "*J K R C P cols"], chip: Chip
) -> Float[Array, "*J K R C P cols"]:
    """Return the sums to convert, with the gain and the offset of their column's ADC."""
    for error, apply in ((chip.gain, jnp.multiply), (chip.offset, jnp.add)):
        if error is not None:
            sums = apply(sums, jnp.broadcast_to(jnp.moveaxis(error, 1, 3), sums.shape))
    return sums


def with_noise(
    sums: Float[Array, "*J K R C P cols"],
    geometry: Geometry,
    config: CrossbarConfig,
    key: Array | None,
) -> Float[Array, "*J K R C P cols"]:
    """Return the sums to convert, with the noise of their conversion, for one input vector's key."""
    deviation = of_conversions(geometry, config, sums.dtype)
    if deviation is None or key is None:
        return sums
    draws = normal(jax.random.fold_in(key, _CONVERSION), sums.shape, sums.dtype)
    return (
        sums
        + jnp.broadcast_to(deviation[:, None, None, None, None], sums.shape) * draws
    )
