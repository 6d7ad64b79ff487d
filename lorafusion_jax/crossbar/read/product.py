"""Everything in one matrix product, where slices and tiles telescope: no ADC, or one that loses nothing."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..chip.chip import Chip
from ..devices.normal_draws import normal
from ..devices.physical import like
from ..mapping import encoding
from .conversion_noise import root


def product(n: Float[Array, "B d_in"], chip: Chip) -> Float[Array, "B d_out"]:
    """Return weights times input codes; read noise, a sum of draws over slices and rows, is one for each output."""
    geometry, config, key = chip.geometry, chip.config, chip.key
    tiled = chip.scale.shape[0] > 1
    per_weight = encoding.per_weight(chip.scale, geometry)
    y = jnp.dot(n, chip.codes * per_weight if tiled else chip.codes, precision="highest")
    noise = config.device.read_noise
    if noise is not None and chip.variance is not None and key is not None:
        cols, d_out = geometry.cols, geometry.shape[1]
        variance, unit = chip.variance, jnp.ones((1, 1), n.dtype)
        if tiled:
            # Over the largest scale, since the square of a small one is zero in float32.
            unit = jnp.max(chip.scale, axis=(0, 1), keepdims=True)
            per_weight = per_weight / unit
            if config.encoding.unit_column:
                starts = np.cumsum((0, *cols[:-1]))
                per_weight = jnp.concatenate([per_weight, per_weight[:, starts]], axis=1)
            variance = variance * jnp.square(per_weight)
        worth = jnp.square(jnp.asarray(geometry.input_significance, n.dtype))
        power = jnp.einsum("j,jbi->bi", worth, jnp.square(encoding.pulses(n, geometry)))
        spread = root(jnp.dot(power, variance, precision="highest")) * like(noise.sigma, n)
        outputs = d_out + (len(cols) if config.encoding.unit_column else 0)
        drawn = spread * normal(key, (n.shape[0], outputs), n.dtype)
        if config.encoding.unit_column:  # one draw for each array's unit column, shared by all its outputs
            drawn, units = drawn[:, :d_out], drawn[:, d_out:]
            drawn = drawn - jnp.repeat(units, np.asarray(cols), axis=1, total_repeat_length=d_out)
        y = y + drawn * unit
    return y if tiled else y * chip.scale
