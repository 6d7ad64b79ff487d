"""Products of packed slices: two or three column sums out of one float32 product.

For input slices too wide for the tables of `lookup`, which are faster otherwise. `mapping.bit_fields` has the
certificate.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...devices.physical import varying_as
from ...mapping.adc.quantiser import Converter
from ...mapping.bit_fields import Packed, Packing, drive, unpack
from ...mapping.encoding import digit
from ...mapping.geometry import significance
from ..conversion_noise import Noise, add_noise, alike


def packed(
    n: Float[Array, "B R rows"],
    cells: Packed,
    packing: Packing,
    adc: Converter,
    slices: tuple[int, ...],
    noise: Noise | None = None,
) -> Float[Array, "K B cols"]:
    """Return the codes of all conversions, shifted and added over input slices and row tiles."""
    n = drive(n, slices)
    worth = jnp.asarray(significance(slices), n.dtype)

    def tile(r: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        x = jax.lax.dynamic_index_in_dim(n, r, 1, keepdims=False)
        operands = [cells.words] if cells.variances is None else [cells.words, cells.variances]
        operands = [jax.lax.dynamic_index_in_dim(a, r, 1, keepdims=False).astype(n.dtype) for a in operands]
        least = jax.lax.dynamic_index_in_dim(cells.low, r, 1, keepdims=False)

        def step(j: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            u = digit(x, slices, j).astype(n.dtype)

            def read(w: int, own: slice, total: Float[Array, "k B cols"]) -> Float[Array, "k B cols"]:
                word = jnp.dot(u, operands[0][w], precision="highest").astype(jnp.int32)
                if packing.variances:
                    word += jnp.dot(u * u, operands[1][w], precision="highest").astype(jnp.int32)
                sums = (unpack(word, packing.fields[own]) + least[own, None]).astype(n.dtype)
                if noise is not None:
                    if packing.variances:
                        variance = unpack(word, packing.variances[own]).astype(n.dtype)
                    else:
                        variance = alike(u[:, : noise.variance.shape[2]], noise.variance[own, r, :, 0])
                    place = r * worth.size + j
                    sums = add_noise(sums, variance, noise, place, (own.start, 0, 0), sums.shape[2])
                return total + worth[j] * adc(sums, adc.scale[own, None, None])

            return tuple(read(w, *pair) for w, pair in enumerate(zip(packing.words, totals, strict=True)))

        return jax.lax.fori_loop(0, worth.size, step, totals)

    shape = (n.shape[0], cells.words.shape[3])
    zeros = (jnp.zeros((own.stop - own.start, *shape), n.dtype) for own in packing.words)
    zero = tuple(varying_as(of_word, n, cells, adc.scale, noise) for of_word in zeros)
    return jnp.concatenate(jax.lax.fori_loop(0, n.shape[1], tile, zero))
