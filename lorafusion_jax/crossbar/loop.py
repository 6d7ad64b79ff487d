"""One product for each row tile, weight slice and input slice, with the ADC in its epilogue.

The path for real-valued cells and inputs, and the one that all others are compared with.

Axis letters: B batch, K weight slices, R row tiles.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .adc import Converter
from .pulses import digit, start


def loop(
    n: Float[Array, "B R rows"],
    cells: Float[Array, "K R rows cols"],
    adc: Converter,
    slices: tuple[int, ...] | None,
    occupied: Bool[Array, "K R"] | None = None,
) -> Float[Array, "K B cols"]:
    """Return the codes of all conversions, shifted and added over input slices and row tiles.

    Args:
      n: input codes.
      cells: what the columns sum, in level units; any real numbers.
      adc: the quantiser of each weight slice.
      slices: bits of every input slice; None for an ideal DAC, whose input is one slice.
      occupied: planes that are not all zero; the others are skipped, for their codes are zero.
    """

    def tile(r: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        x = jax.lax.dynamic_index_in_dim(n, r, 1, keepdims=False)
        inputs = [(1.0, x)]
        if slices is not None:
            inputs = [(2.0 ** start(slices, j), digit(x, slices, j).astype(n.dtype)) for j in range(len(slices))]

        def read(k: int, total: Array) -> Array:
            plane = jax.lax.dynamic_index_in_dim(cells[k], r, 0, keepdims=False)
            for worth, u in inputs:
                total += worth * adc(jnp.dot(u, plane, precision="highest"), adc.inv_lsb[k])
            return total

        if occupied is None:
            return tuple(read(k, total) for k, total in enumerate(totals))
        return tuple(
            jax.lax.cond(occupied[k, r], lambda total, k=k: read(k, total), lambda total: total, total)
            for k, total in enumerate(totals)
        )

    zero = jnp.zeros((n.shape[0], cells.shape[3]), n.dtype)
    return jnp.stack(jax.lax.fori_loop(0, n.shape[1], tile, (zero,) * cells.shape[0]))
