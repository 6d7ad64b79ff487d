"""One product for each row tile, weight slice and input slice, with the ADC in its epilogue.

The path for real-valued cells and inputs, and the one that the others are compared with.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ...devices.physical import varying_as
from ...mapping.adc.quantiser import Converter
from ...mapping.encoding import digit
from ...mapping.geometry import significance
from ..conversion_noise import Noise, add_noise


def loop(
    n: Float[Array, "B R rows"],
    cells: Float[Array, "K R rows cols"],
    adc: Converter,
    slices: tuple[int, ...] | None,
    occupied: Bool[Array, "K R"] | None = None,
    noise: Noise | None = None,
) -> Float[Array, "K B cols"]:
    """Return the codes of all conversions, shifted and added over input slices and row tiles.

    Args:
      cells: factors of the inputs in level units; any real numbers.
      slices: bits of every input slice; None for an ideal DAC, whose input is one slice.
      occupied: planes that are not all zero; the others are skipped, for their codes are zero.
    """
    worth = jnp.asarray((1.0,) if slices is None else significance(slices), n.dtype)

    def step(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        r, j = i // worth.size, i % worth.size
        u = jax.lax.dynamic_index_in_dim(n, r, 1, keepdims=False)
        if slices is not None:
            u = digit(u, slices, j).astype(n.dtype)

        def read(k: int, total: Array) -> Array:
            plane = _of_pair(cells, k, r)
            sums = jnp.dot(u, plane, precision="highest")
            if noise is not None:
                variance = jnp.dot(jnp.square(u), _of_pair(noise.variance, k, r), precision="highest")
                sums = add_noise(sums[None], variance[None], noise, i, (k, 0, 0), plane.shape[1])[0]
            return total + worth[j] * adc(sums, adc.scale[k])

        if occupied is None:
            return tuple(read(k, total) for k, total in enumerate(totals))
        return tuple(
            jax.lax.cond(occupied[k, r], lambda total, k=k: read(k, total), lambda total: total, total)
            for k, total in enumerate(totals)
        )

    zero = varying_as(jnp.zeros((n.shape[0], cells.shape[3]), n.dtype), n, cells, adc.scale, occupied, noise)
    return jnp.stack(jax.lax.fori_loop(0, n.shape[1] * worth.size, step, (zero,) * cells.shape[0]))


def _of_pair(planes: Float[Array, "K R rows _cols"], k: int, r: Array) -> Float[Array, "rows _cols"]:
    """Return one plane in a single slice: `planes[k]` first would be copied in every step, for all row tiles."""
    return jnp.squeeze(jax.lax.dynamic_slice(planes, (k, r, 0, 0), (1, 1, *planes.shape[2:])), (0, 1))
