"""The path `product`: all slices and tiles telescope to one matrix product with the weights as programmed."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ...chip.chip import Chip
from ...chip.columns import Laid, Written
from ...chip.plan import Facts
from ...config.schema import CrossbarConfig
from ...devices.normal_draws import normal
from ...devices.physical import like
from ...mapping import encoding
from ...mapping.adc.quantiser import Converter
from ...mapping.geometry import Geometry
from ..conversion_noise import root
from .path import ReadPath


class ProductPath(ReadPath):
    """Without an ADC, or with one that has a code for every possible sum."""

    name = "product"
    converts = False

    def refusal(self, facts: Facts) -> str | None:
        if facts.telescopes:
            return None
        return f"is not exact here: {facts.nonlinear or 'the ADC loses bits'}"

    def chosen(self, facts: Facts) -> str | None:
        if not facts.telescopes:
            return None
        lossless = "the ADC loses nothing: integer levels within its range"
        reason = "there is no ADC" if facts.config.adc is None else lossless
        return f"one matrix product: {reason}, so that all slices and tiles telescope"

    def lay_out(self, written: Written) -> Laid:
        variance = written.variance()
        code_variance = (
            None
            if variance is None
            else _telescoped(variance, written.geometry, written.config)
        )
        return Laid(written.plan, variance=code_variance)

    def read(
        self, n: Float[Array, "B d_in"], quantise: Converter | None, chip: Chip
    ) -> Float[Array, "B d_out"]:
        """Return weights times input codes; read noise, a sum of draws over slices and rows, is one for each output."""
        geometry = chip.geometry
        config = chip.config
        key = chip.key
        tiled = chip.scale.shape[0] > 1
        per_weight = encoding.per_weight(chip.scale, geometry)
        y = jnp.dot(
            n, chip.codes * per_weight if tiled else chip.codes, precision="highest"
        )
        noise = config.device.read_noise
        if noise is not None and chip.variance is not None and key is not None:
            cols = geometry.cols
            d_out = geometry.shape[1]
            variance = chip.variance
            unit = jnp.ones((1, 1), n.dtype)
            if tiled:
                # Over the largest scale, since the square of a small one is zero in float32.
                unit = jnp.max(chip.scale, axis=(0, 1), keepdims=True)
                per_weight = per_weight / unit
                if config.encoding.unit_column:
                    starts = np.cumsum((0, *cols[:-1]))
                    per_weight = jnp.concatenate(
                        [per_weight, per_weight[:, starts]], axis=1
                    )
                variance = variance * jnp.square(per_weight)
            worth = jnp.square(jnp.asarray(geometry.input_significance, n.dtype))
            power = jnp.einsum(
                "j,jbi->bi", worth, jnp.square(encoding.pulses(n, geometry))
            )
            spread = root(jnp.dot(power, variance, precision="highest")) * like(
                noise.sigma, n
            )
            outputs = d_out + (len(cols) if config.encoding.unit_column else 0)
            draws = spread * normal(key, (n.shape[0], outputs), n.dtype)
            if (
                config.encoding.unit_column
            ):  # one draw for each array's unit column, shared by all its outputs
                draws, units = draws[:, :d_out], draws[:, d_out:]
                draws = draws - jnp.repeat(
                    units, np.asarray(cols), axis=1, total_repeat_length=d_out
                )
            y = y + draws * unit
        return y if tiled else y * chip.scale


def _telescoped(
    variance: Float[Array, "K R rows _cols"], geometry: Geometry, config: CrossbarConfig
) -> Float[Array, "_rows _cols"]:
    """Return the variances of weight codes, given those of every slice's columns."""
    worth = jnp.asarray(geometry.significance, variance.dtype)
    if (
        config.device.read_noise is not None
        and config.device.read_noise.kind == "independent"
    ):
        worth = (
            worth
            * jnp.asarray(geometry.levels, variance.dtype)
            / (1 - like(config.g_min, variance))
        )
    code_variance = jnp.einsum("k,krio->rio", jnp.square(worth), variance)
    return encoding.join(code_variance, geometry.rows, 0, front=True)
