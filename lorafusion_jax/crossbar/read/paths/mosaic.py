"""The path `mosaic`: slices, conversions and their sums in one Pallas kernel, in a TPU's fast memory."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ....support.platform import for_one_tpu
from ...chip.chip import Chip
from ...chip.columns import Laid, Written
from ...chip.plan import Facts
from ...mapping.adc.quantiser import Converter
from ..conversion_noise import Noise
from .by_kernel import KernelPath, in_bytes, slices_of
from .path import products, quiet

# largest input that bfloat16 holds with all smaller ones, and rows of a TPU's fast memory
_BYTE = 255
_TALL = 4096


def _fits(facts: Facts) -> str | None:
    geometry = facts.geometry
    if (
        facts.config.dac is not None
        and geometry.converted_top <= _BYTE
        and geometry.tallest <= _TALL
    ):
        return None
    size = f"takes inputs of up to 8 bits in a conversion and arrays of up to {_TALL:,} rows"
    return f"{size}: set dac.slice_bits and tile.rows"


class MosaicPath(KernelPath):
    """The fastest on one TPU, except for conversions that divide: they take the kernel longer than XLA."""

    name = "mosaic"
    needs = (quiet, _fits, products)

    def chosen(self, facts: Facts) -> str | None:
        if (
            for_one_tpu()
            and facts.ties != "divide"
            and not any(need(facts) for need in self.needs)
        ):
            return "slices, conversions and their sums in one kernel, next to a TPU's units"
        return None

    def form(self, laid: Laid, written: Written) -> Laid:
        return in_bytes(laid, written)

    def codes(
        self,
        tiles: Float[Array, "B R rows"],
        columns: Any,
        adc: Converter,
        noise: Noise | None,
        chip: Chip,
    ) -> Float[Array, "k B _cols"]:
        # Not for gradients, which need the ADC without rounding, and kernels have none; and no TPU has float64.
        if not adc.rounds or tiles.dtype != jnp.float32:
            return super().codes(tiles, columns, adc, noise, chip)
        from .mosaic_kernel import (
            mosaic,
        )  # here, since Pallas takes a quarter of a second to load

        return mosaic(
            tiles, columns, adc, slices_of(chip), signed=chip.config.signed_inputs
        )
