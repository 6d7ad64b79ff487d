"""Column sums by counting bits: the fastest for single vectors on wide matrices, as when a model generates tokens.

The bits of the cells' levels and of the input slices lie 32 rows to a word. A conversion is then

    S = sum_{i, t} 2^(i + t) (#(positive & cell bit i & input bit t) - #(negative & ...))

with population counts, all fused with the ADC by XLA. Fast where the processor counts the bits of a whole vector at
once (AVX512_VPOPCNTDQ); right everywhere.

Axis letters: B batch, K weight slices, I bits of a cell, R row tiles, Q words of 32 rows.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from ....support.platform import for_cpu
from ...chip.chip import Chip
from ...chip.columns import Laid, Written
from ...chip.plan import Facts, Plan
from ...devices.physical import varying_as
from ...mapping.adc.quantiser import Converter
from ...mapping.encoding import digit
from ...mapping.geometry import significance
from ..conversion_noise import Noise
from .by_kernel import KernelPath, slices_of
from .path import integers, narrow, products, quiet

_WIDE = 512  # columns from which counting bits is faster than packed products, for a single vector


class PlanesPath(KernelPath):
    """The fastest for single vectors on wide matrices, where the processor counts the bits of vectors."""

    name = "planes"
    needs = (narrow, integers, quiet, products)
    tile_axis = 3
    coded = True

    def reads_vectors(self, plan: Plan, facts: Facts) -> bool:
        able = plan.path in ("lookup", "loop", "packed") and not any(need(facts) for need in self.needs)
        return able and facts.geometry.shape[1] >= _WIDE and for_cpu() and _counts_vectors()

    def form(self, laid: Laid, written: Written) -> Laid:
        return laid._replace(columns=to_planes(laid.columns, max(written.config.weight_slices)))

    def codes(
        self, tiles: Float[Array, "B R rows"], columns: Any, adc: Converter, noise: Noise | None, chip: Chip
    ) -> Float[Array, "k B _cols"]:
        return planes(tiles, columns, adc, slices_of(chip), signed=chip.config.signed_inputs)


def to_planes(cells: Float[Array, "K R rows cols"], bits: int) -> UInt32[Array, "K I 2 R Q cols"]:
    """Return the bit planes of integer cells of |g| < 2^bits: of the positive ones, then of the negative ones."""
    whole = cells.astype(jnp.int32)
    sides = jnp.maximum(jnp.stack([whole, -whole], axis=1), 0).astype(jnp.uint32)
    return jnp.stack([_to_words(sides, 3, bit) for bit in range(bits)], axis=1)


def planes(
    n: Float[Array, "B R rows"],
    cells: UInt32[Array, "K I 2 R Q cols"],
    adc: Converter,
    slices: tuple[int, ...],
    *,
    signed: bool,
) -> Float[Array, "K B cols"]:
    """Return the codes of all conversions of cells from `to_planes`, shifted and added over slices and row tiles."""
    worth = jnp.asarray(significance(slices), n.dtype)

    def step(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        r, j = i // worth.size, i % worth.size
        u = digit(jax.lax.dynamic_index_in_dim(n, r, 1, keepdims=False), slices, j)
        of_tile = jax.lax.dynamic_index_in_dim(cells, r, 3, keepdims=False)
        sides = [jnp.maximum(side, 0).astype(jnp.uint32) for side in ((u, -u) if signed else (u,))]
        driven = [[_to_words(side, 1, t) for t in range(max(slices))] for side in sides]
        up, down = driven[0], driven[1] if signed else None

        def read(k: int, total: Float[Array, "B cols"]) -> Float[Array, "B cols"]:
            count = jnp.zeros(total.shape, jnp.int32)
            for bit, (positive, negative) in enumerate(of_tile[k]):
                for t in range(max(slices)):
                    counted = jnp.zeros(total.shape, jnp.int32)
                    for q in range(positive.shape[0]):
                        x, plus, minus = up[t][:, q, None], positive[None, q], negative[None, q]
                        more, less = x & plus, x & minus
                        if down is not None:
                            y = down[t][:, q, None]
                            more, less = more | (y & minus), less | (y & plus)
                        counted += jax.lax.population_count(more).astype(jnp.int32)
                        counted -= jax.lax.population_count(less).astype(jnp.int32)
                    count += counted << (bit + t)
            return total + worth[j] * adc(count.astype(n.dtype), adc.scale[k])

        return tuple(read(k, total) for k, total in enumerate(totals))

    zero = varying_as(jnp.zeros((n.shape[0], cells.shape[5]), n.dtype), n, cells, adc.scale)
    return jnp.stack(jax.lax.fori_loop(0, n.shape[1] * worth.size, step, (zero,) * cells.shape[0]))


def _to_words(values: UInt32[Array, "..."], axis: int, bit: int) -> UInt32[Array, "..."]:
    """Pack one bit of every value along an axis: row by row, because XLA's sums over an axis are slow on a CPU."""
    widths = [(0, -size % 32 if a == axis else 0) for a, size in enumerate(values.shape)]
    words = jnp.pad(values, widths).reshape(*values.shape[:axis], -1, 32, *values.shape[axis + 1 :])
    rows = (jax.lax.index_in_dim(words, row, axis + 1, keepdims=False) for row in range(32))
    shifted = (((row >> np.uint32(bit)) & 1) << np.uint32(place) for place, row in enumerate(rows))
    return functools.reduce(jnp.bitwise_or, shifted)


@functools.cache
def _counts_vectors() -> bool:
    """Return whether the processor counts the bits of whole vectors (AVX512_VPOPCNTDQ)."""
    try:
        return "avx512_vpopcntdq" in pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
