"""Noise of conversions: one normal draw for each, for the cells' read noise and the ADC's own.

Independent normal noise of the cells adds up to normal noise of the column, with variance

    V = sum_rows u^2 v,

v being the variance of a cell, or of both cells of a differential pair; that of the ADC adds to it. A draw depends on
the key and the conversion's place alone, so that every path makes the same.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from ..config.schema import CrossbarConfig
from ..devices.normal_draws import normal_at
from ..devices.physical import like
from ..mapping.adc.quantiser import stacked_units
from ..mapping.decoding import kappa
from ..mapping.geometry import Cells, Geometry


class Noise(NamedTuple):
    """The read noise of one read.

    Attributes:
      variance: [K, R, rows, cols or 1] of each cell; None where they travel with cells in words.
      scale: [K] factors of the deviations.
      words: data of the key of the random stream.
      of_adc: [K] standard deviation of a conversion itself; None for none.
    """

    variance: Any
    scale: Float[Array, " K"]
    words: UInt32[Array, "2"]
    of_adc: Float[Array, " K"] | None = None


def powers(
    cells: Cells, geometry: Geometry, config: CrossbarConfig
) -> Float[Array, "K P R C rows _cols"]:
    """Return each cell's variance over the square of `deviations`: G^2 in level units, or 1 for all columns alike."""
    assert config.device.read_noise is not None
    if config.device.read_noise.kind == "independent":
        return jnp.ones_like(cells[..., :1])
    return jnp.square(cells + kappa(geometry, config, cells))


def deviations(
    geometry: Geometry, config: CrossbarConfig, dtype: jnp.dtype
) -> Float[Array, " K"]:
    """Return the standard deviation of a cell whose power is 1, in the level units of every weight slice."""
    noise = config.device.read_noise
    top = jnp.asarray(geometry.levels, dtype)
    if noise is None:
        return jnp.zeros_like(top)
    units = (
        jnp.ones_like(top)
        if noise.kind == "proportional"
        else top / (1 - like(config.g_min, top))
    )
    return jnp.asarray(noise.sigma, dtype) * units


def of_conversions(
    geometry: Geometry, config: CrossbarConfig, dtype: jnp.dtype
) -> Float[Array, " K"] | None:
    """Return the standard deviation of a conversion, in the level units of every weight slice; None for none."""
    if config.adc is None or config.adc.noise is None:
        return None
    return stacked_units(geometry, config, dtype) * jnp.asarray(config.adc.noise, dtype)


def stream(key: PRNGKeyArray) -> UInt32[Array, "2"]:
    """Return the random stream of a key of any generator."""
    return jax.random.bits(key, (2,), jnp.uint32)


def add_noise(
    sums: Float[Array, "k B C"],
    variance: Float[Array, "k B #C"],
    noise: Noise,
    place: Int[Array, ""],
    corner: tuple[int, int | Int[Array, ""], int | Int[Array, ""]],
    cols: int,
) -> Float[Array, "k B C"]:
    """Return sums of one row tile and input slice, number `place`, with noise; in [K, B, cols] they are at `corner`."""

    def places_on(axis: int) -> UInt32[Array, "k B C"]:
        first = jnp.asarray(corner[axis]).astype(jnp.uint32)
        return jax.lax.broadcasted_iota(jnp.uint32, sums.shape, axis) + first

    k = places_on(0)
    b = places_on(1)
    c = places_on(2)
    planes = np.uint32(noise.scale.shape[0])
    place = place.astype(jnp.uint32)
    draws = normal_at(noise.words, place * planes + k, b * jnp.uint32(cols) + c)
    planes_of_sums = slice(corner[0], corner[0] + sums.shape[0])
    scale = noise.scale[planes_of_sums, None, None]
    deviation = scale * root(variance)
    if noise.of_adc is not None:
        deviation = root(
            jnp.square(scale) * variance
            + jnp.square(noise.of_adc[planes_of_sums, None, None])
        )
    return sums + deviation * draws.astype(sums.dtype)


def alike(
    u: Float[Array, "B rows"], variance: Float[Array, "k rows"]
) -> Float[Array, "k B 1"]:
    """Return V where all columns have the same."""
    return jnp.dot(variance, jnp.square(u).T, precision="highest")[:, :, None]


@jax.custom_jvp
def root(variance: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the square root, whose derivative is taken as zero where nothing is driven and the variance is zero."""
    return jnp.sqrt(variance)


root.defjvps(
    lambda moved, root, _: (
        moved * jnp.where(root > 0, 0.5 / jnp.where(root > 0, root, 1), 0)
    )
)
