"""Products of row tiles and input slices, with the ADC in their epilogue: the paths `loop` and `packed`.

Real-valued cells take one product for each weight slice. Integers share words: two or three column sums come out
of one float32 product; `mapping.bit_fields` has the certificate.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ...devices.physical import varying_as
from ...mapping.adc.quantiser import Converter
from ...mapping.bit_fields import BitFields, FieldWords, drive, unpack
from ...mapping.encoding import digit
from ...mapping.geometry import significance
from ..conversion_noise import Noise, add_noise, alike


def sliced_products(
    n: Float[Array, "B R rows"],
    cells: FieldWords | Float[Array, "K R rows cols"],
    bit_fields: BitFields | None,
    adc: Converter,
    slices: tuple[int, ...] | None,
    occupied: Bool[Array, "K R"] | None = None,
    noise: Noise | None = None,
) -> Float[Array, "K B cols"]:
    """Return the codes of all conversions, shifted and added over input slices and row tiles.

    Cells are in level units: real numbers, or integers in words of `bit_fields.FLOAT_BITS`. No `slices` mean an ideal
    DAC. Planes that are not `occupied` are skipped. The variances of `noise` are not read where words hold them.
    """
    if isinstance(cells, FieldWords):
        assert bit_fields is not None and slices is not None
        n = drive(n, slices)
        words = bit_fields.words
        operands = (
            [cells.words] if cells.variances is None else [cells.words, cells.variances]
        )
    else:
        words = [slice(k, k + 1) for k in range(len(cells))]
        operands = [cells] if noise is None else [cells, noise.variance]
    worth = jnp.asarray((1.0,) if slices is None else significance(slices), n.dtype)

    def tile(r: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        x = jax.lax.dynamic_index_in_dim(n, r, 1, keepdims=False)
        least = (
            jax.lax.dynamic_index_in_dim(cells.low, r, 1, keepdims=False)
            if isinstance(cells, FieldWords)
            else None
        )

        def plane(operand: Array, w: int) -> Float[Array, "rows _cols"]:
            # In a single slice: `operand[w]` first would be copied in every step, for all row tiles.
            word_plane = jax.lax.dynamic_slice(
                operand, (w, r, 0, 0), (1, 1, *operand.shape[2:])
            )
            return jnp.squeeze(word_plane, (0, 1)).astype(n.dtype)

        planes = [
            [plane(operand, w) for w in range(len(words))] for operand in operands
        ]

        def step(j: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            u = x if slices is None else digit(x, slices, j).astype(n.dtype)

            def read(
                w: int, planes_of_word: slice, total: Float[Array, "k B cols"]
            ) -> Float[Array, "k B cols"]:
                factors = zip((u, u * u), planes, strict=False)
                products = [
                    jnp.dot(factor, word_planes[w], precision="highest")
                    for factor, word_planes in factors
                ]
                if bit_fields is None or least is None:
                    sums = products[0][None]
                    variances = [variance[None] for variance in products[1:]]
                else:
                    word = functools.reduce(
                        jnp.add,
                        [word_product.astype(jnp.int32) for word_product in products],
                    )
                    sums = (
                        unpack(word, bit_fields.fields[planes_of_word])
                        + least[planes_of_word, None]
                    ).astype(n.dtype)
                    variances = (
                        [
                            unpack(word, bit_fields.variances[planes_of_word]).astype(
                                n.dtype
                            )
                        ]
                        if bit_fields.variances
                        else []
                    )
                if noise is not None:
                    if not variances:
                        variances = [
                            alike(
                                u[:, : noise.variance.shape[2]],
                                noise.variance[planes_of_word, r, :, 0],
                            )
                        ]
                    sums = add_noise(
                        sums,
                        variances[0],
                        noise,
                        r * worth.size + j,
                        (planes_of_word.start, 0, 0),
                        sums.shape[2],
                    )
                return total + worth[j] * adc(
                    sums, adc.scale[planes_of_word, None, None]
                )

            if occupied is None:
                return tuple(
                    read(w, *pair)
                    for w, pair in enumerate(zip(words, totals, strict=True))
                )
            return tuple(
                jax.lax.cond(
                    occupied[k, r],
                    lambda total, k=k: read(k, words[k], total),
                    lambda total: total,
                    total,
                )
                for k, total in enumerate(totals)
            )

        return jax.lax.fori_loop(0, worth.size, step, totals)

    zeros = (
        jnp.zeros(
            (planes_of_word.stop - planes_of_word.start, len(n), operands[0].shape[3]),
            n.dtype,
        )
        for planes_of_word in words
    )
    zero = tuple(
        varying_as(word_zeros, n, cells, adc.scale, occupied, noise)
        for word_zeros in zeros
    )
    return jnp.concatenate(jax.lax.fori_loop(0, n.shape[1], tile, zero))
