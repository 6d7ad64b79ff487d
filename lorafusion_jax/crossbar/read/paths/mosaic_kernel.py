"""The whole chain of a read in one Pallas kernel for a TPU: compiled by Mosaic, not run on one.

Only input codes, cells, and sums of codes cross the large memory. Elsewhere, and on a mesh, which cannot split a
kernel, Pallas runs it as a plain loop. Integer cells are multiplied as bytes. Real ones are split into three bfloat16
numbers of 8 bits each, as many as a float32 has. Codes are added up in int32.

Axis letters: B batch, K weight slices, k those of one block, J input slices, R row tiles, C columns of a block.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int8

from ....support.platform import for_one_tpu
from ...mapping.adc.quantiser import Converter

# Inputs and columns of a block; and rows of one product, which are inputs times input slices.
_BATCH = 256
_COLUMNS = 512
_PRODUCT = 512
# Bytes of one plane of a block, and of its cells and sums, which are in memory twice.
_PLANE_BYTES = 2**20
_BLOCK_BYTES = 3 * 2**20
# Added to a float32 below 2^22, it rounds it half to even and leaves it in the lowest bits.
_ROUND = 1.5 * 2**23
_ROUND_BITS = 0x4B400000


def mosaic(
    n: Float[Array, "B R rows"],
    cells: Int8[Array, "K R rows cols"] | Float[Array, "K R rows cols"],
    adc: Converter,
    slices: tuple[int, ...],
    *,
    signed: bool,
) -> Float[Array, "K B cols"]:
    """Return the codes of all conversions, shifted and added over input slices, of at most 8 bits, and row tiles.

    Cells are in level units; bytes for integers, whose input slices then have at most 7 bits.
    """
    batch, tiles, rows = n.shape
    planes = cells.shape[0]
    cols = cells.shape[3]
    chunk = _BATCH
    while chunk > 32 and (chunk * len(slices) > _PRODUCT or chunk >= 2 * batch):
        chunk //= 2
    inputs = _share(batch, _BATCH, chunk)
    of_block, width = _block(cells, inputs)
    n = jnp.pad(n.astype(jnp.int32), ((0, -batch % inputs), (0, 0), (0, 0)))
    moved = (
        4 * (n.size * pl.cdiv(cols, width) + planes * n.shape[0] * cols)
        + cells.size * cells.dtype.itemsize
    )
    work = pl.CostEstimate(
        flops=2 * n.size * len(slices) * planes * cols,
        bytes_accessed=moved,
        transcendentals=0,
    )
    read = functools.partial(
        _read, adc=adc._replace(scale=None), slices=slices, signed=signed, chunk=chunk
    )
    total = pl.pallas_call(
        read,
        grid=(pl.cdiv(cols, width), planes // of_block, n.shape[0] // inputs, tiles),
        in_specs=[
            pl.BlockSpec(
                (1, planes), lambda c, k, b, r: (0, 0), memory_space=pltpu.SMEM
            ),
            pl.BlockSpec((1, inputs, rows), lambda c, k, b, r: (r, b, 0)),
            pl.BlockSpec((of_block, 1, rows, width), lambda c, k, b, r: (k, r, 0, c)),
        ],
        out_specs=pl.BlockSpec((of_block, inputs, width), lambda c, k, b, r: (k, b, c)),
        out_shape=jax.ShapeDtypeStruct((planes, n.shape[0], cols), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=work,
        interpret=not for_one_tpu(),
        name="crossbar_read",
    )(adc.scale[None], jnp.moveaxis(n, 1, 0), cells)
    return (total[:, :batch] - _excess(adc, slices, tiles)).astype(adc.scale.dtype)


def _read(
    scale: Any,
    n: Any,
    cells: Any,
    total: Any,
    *,
    adc: Converter,
    slices: tuple[int, ...],
    signed: bool,
    chunk: int,
) -> None:
    """Add the codes of one row tile and block, given references [1, K], [1, B, rows], [k, 1, rows, C], [k, B, C]."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        total[...] = jnp.zeros(total.shape, total.dtype)

    starts = _starts(slices)
    first = pl.program_id(1) * total.shape[0]

    def of_inputs(i: Int[Array, ""], _: None) -> None:
        own = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
        codes = n[0, own, :]
        magnitude = jnp.abs(codes) if signed else codes
        driven = [
            (magnitude >> start) & (2**bits - 1)
            for start, bits in zip(starts, slices, strict=True)
        ]
        u = jnp.concatenate(
            [jnp.where(codes < 0, -of_slice, of_slice) for of_slice in driven]
            if signed
            else driven
        )
        for k in range(total.shape[0]):
            found = _codes(_product(u, cells[k, 0]), scale[0, first + k], adc)
            added = total[k, own, :]
            for j, start in enumerate(starts):
                added += found[j * chunk : (j + 1) * chunk] << start
            total[k, own, :] = added

    jax.lax.fori_loop(0, total.shape[1] // chunk, of_inputs, None)


def _product(u: Int[Array, "_BJ rows"], plane: Array) -> Float[Array, "_BJ C"]:
    """Return the column sums of one plane."""
    if plane.dtype == jnp.int8:
        return jnp.dot(
            u.astype(jnp.int8), plane, preferred_element_type=jnp.int32
        ).astype(jnp.float32)
    u = u.astype(jnp.float32).astype(jnp.bfloat16)
    high = plane.astype(jnp.bfloat16)
    rest = plane - high.astype(jnp.float32)
    middle = rest.astype(jnp.bfloat16)
    parts = (high, middle, (rest - middle.astype(jnp.float32)).astype(jnp.bfloat16))
    sums = [
        jnp.dot(u, part, preferred_element_type=jnp.float32, precision="default")
        for part in parts
    ]
    return sums[0] + sums[1] + sums[2]


def _codes(
    sums: Float[Array, "_BJ C"], scale: Float[Array, ""], adc: Converter
) -> Int[Array, "_BJ C"]:
    """Return the codes of sums, with `_ROUND_BITS` in each where `_excess` takes them off."""
    if adc.divides:
        return adc(sums, scale).astype(jnp.int32)
    # Both ends of the range are whole, so that it makes no difference whether a sum is clipped or rounded first.
    return jax.lax.bitcast_convert_type(
        jnp.clip(sums * scale, adc.qmin, adc.qmax) + _ROUND, jnp.int32
    )


def _excess(adc: Converter, slices: tuple[int, ...], tiles: int) -> int:
    """Return what `_codes` add up to beyond the codes, modulo 2^32 as all sums of int32."""
    if adc.divides:
        return 0
    whole = _ROUND_BITS * tiles * sum(2**start for start in _starts(slices))
    return (whole + 2**31) % 2**32 - 2**31


def _starts(slices: tuple[int, ...]) -> list[int]:
    return np.cumsum((0, *slices))[:-1].tolist()


def _share(size: int, most: int, unit: int) -> int:
    """Return the size of equal blocks of whole units, no more of them than of `most` each."""
    return pl.cdiv(pl.cdiv(size, pl.cdiv(size, most)), unit) * unit


def _block(cells: Array, inputs: int) -> tuple[int, int]:
    """Return how many weight slices and columns make up a block."""
    planes, _, rows, cols = cells.shape
    of_column = rows * cells.dtype.itemsize  # bytes
    counts = [count for count in range(planes, 0, -1) if planes % count == 0]
    fitting = (
        (count, width)
        for width, count in itertools.product((_COLUMNS, _COLUMNS // 2, 128), counts)
        if width * of_column <= _PLANE_BYTES
        and count * width * (of_column + inputs * 4) <= _BLOCK_BYTES
    )
    count, width = next(fitting, (1, 128))
    return count, cols if cols <= width else _share(cols, width, 128)
