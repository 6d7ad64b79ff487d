"""The path `packed`: one product for several weight slices of integer cells, which share a float32."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ....support.platform import is_traced
from ...chip.columns import Laid, Written
from ...mapping.bit_fields import FLOAT_BITS, Packing, certify, over_rows, pack
from ...mapping.geometry import Columns
from .by_kernel import KernelPath
from .path import integers, products


class PackedPath(KernelPath):
    """Planned as `loop`, until the columns are known."""

    name = "packed"
    needs = (integers, products)

    def form(self, laid: Laid, written: Written) -> Laid:
        if not fit_words(laid, written):
            raise ValueError("path='packed' has no room for this noise: leave path out")
        spans, packing = certificate(laid, written, FLOAT_BITS)
        if packing is None:
            raise ValueError(
                f"path='packed': sums of up to {max(spans)} levels do not fit {FLOAT_BITS} bits: leave path out"
            )
        return in_words(laid, written, packing)


def fit_words(laid: Laid, written: Written) -> bool:
    """Return whether columns and variances are integers, so that words can hold them."""
    # Squares of halves, and of levels with Gmin, are not integers.
    config = written.config
    whole_squares = not config.encoding.two_sided and config.cell.on_off_ratio is None
    return laid.plan.integers and (_squares(laid) is None or whole_squares)


def certificate(
    laid: Laid, written: Written, word_bits: int
) -> tuple[list[int], Packing | None]:
    """Return the span of every slice's sums, and a packing of them in such words, or None if they do not fit.

    A packing is certified by the columns' own sums if these are known, else by the largest sums of any weights.
    """
    geometry = written.geometry
    squares = _squares(laid)
    count = len(laid.columns)
    top = geometry.converted_top

    def largest(cells: Array, power: int) -> list[int]:
        if is_traced(cells):
            levels = geometry.levels * (count // len(geometry.levels))
            return [geometry.tallest * (top * level) ** power for level in levels]
        return [
            top**power * int(slice_level)
            for slice_level in np.max(np.asarray(over_rows(cells)), axis=(1, 2))
        ]

    spans = [
        (1 + written.config.signed_inputs) * most
        for most in largest(jnp.abs(laid.columns), 1)
    ]
    return spans, certify(
        spans, word_bits, () if squares is None else largest(squares, 2)
    )


def in_words(laid: Laid, written: Written, packing: Packing) -> Laid:
    """Return the columns in words, with their variances unless these are alike for all columns."""
    squares = _squares(laid)
    signed = written.config.signed_inputs
    words = pack(
        laid.columns,
        packing,
        written.geometry.converted_top,
        signed=signed,
        variances=squares,
    )
    plan = dataclasses.replace(laid.plan, packing=packing)
    return laid._replace(
        plan=plan, columns=words, variance=laid.variance if squares is None else None
    )


def _squares(laid: Laid) -> Columns | None:
    """Return the variances that differ from column to column, or None."""
    return (
        None if laid.variance is None or laid.variance.shape[3] == 1 else laid.variance
    )
