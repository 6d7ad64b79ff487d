"""Preparations of matrices that share an input, from the inputs' second moments and the errors of the device.

The expected error power at the outputs of a matrix is

    P = sum_j sum_i s_i [(t_j (q_ij + b(q_ij)) - w_ij)^2 + t_j^2 v(q_ij)]

with s_i the mean square of input i, t_j the range of column j, q_ij the code in units of it, clipped and rounded, and b
and v the mean and variance of a code's error (`code_errors`). Ranges minimise it. Factors minimise it approximately,
with a constant v, and t_j the largest weight of a column or, after a transform, a multiple of its root mean square.

Similar changes before quantisation: SmoothQuant (Xiao et al., arXiv 2211.10438) and AWQ (Lin et al., arXiv 2306.00978)
scale inputs, QuIP# (Tseng et al., arXiv 2402.04396) and QuaRot (Ashkboos et al., arXiv 2404.00456) rotate them.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ...support.platform import is_traced
from ...support.reading import error_context
from ..chip.chip import one_by_one
from ..chip.program import has_errors
from ..config.schema import CrossbarConfig
from .code_errors import CodeErrors, code_errors
from .preparation import Preparation
from .transform import transform_matrices

_CLIPS = np.linspace(
    1, 0.3, 36
)  # ranges that are tried, as shares of a column's largest weight
_POWERS = np.linspace(0, 1, 21)  # exponents of the factors without a transform
# smallest mean square of an input, and square of a row, as shares of the median
_LEAST_INPUT = 0.1
_LEAST_ROW = 1e-6


def prepare(
    matrices: Mapping[str, Float[Array, "*N d_in _cols"]],
    moments: Float[Array, "..."] | None,
    config: CrossbarConfig,
    *,
    seed: int = 0,
    transformed: Float[Array, "..."] | None = None,
    errors: CodeErrors | None = None,
) -> dict[str, Preparation]:
    """Return a preparation of each of some matrices that meet the same inputs, with the changes in `config.mapping`.

    The matrices share factors and transform, and have their own ranges.

    Args:
      matrices: name -> weights, whose shapes differ in d_out alone.
      moments: [*N, d_in], mean square of each input; None for equal ones.
      config: configuration of their arrays.
      seed: seed of the signs of a transform.
      transformed: [*N, d_in], mean square of each input after factors and transform, measured; None for their mean.
      errors: errors of the device (`code_errors`), if they are known.

    Raises:
      ValueError: shapes differ, moments are negative, not finite or of another width, the width has no transform,
        or values of the device are traced.
    """
    shape = _shared_shape(matrices)
    for array in (moments, transformed):
        _check_moments(array, shape)
    if is_traced((config, matrices)):
        raise ValueError(
            "prepare reads weights and the device's values: call it outside of jax.jit and jax.vmap"
        )
    mapping = config.mapping
    transforms = config.mapping.transform == "hadamard"
    weights = {name: jnp.asarray(w, jnp.float32) for name, w in matrices.items()}
    if moments is None:
        squares = jnp.ones(shape)
    else:
        squares = _floored(jnp.asarray(moments, jnp.float32))
    factors = jnp.ones(shape)
    if mapping.factors:
        factors_of_matrix = (
            _spreading_factors if transforms else _largest_weight_factors
        )
        factors = jax.jit(one_by_one(factors_of_matrix, shape[:-1]))(
            jnp.concatenate(list(weights.values()), axis=-1), squares
        )
    if transforms:
        with error_context(", ".join(weights)):
            transform_matrices(shape[-1])  # refuses a width that has none
        signs = np.random.default_rng(seed).choice(
            np.array([-1, 1], np.float32), shape[-1]
        )
        factors = factors * np.broadcast_to(signs, shape)
    used_factors = factors if mapping.factors or transforms else None
    bare = Preparation(
        factors=used_factors, transforms=transforms, white=moments is None
    )
    if transformed is None:
        squares = bare.moments(squares)
    else:
        squares = _floored(jnp.asarray(transformed, jnp.float32))
    prepared = dict.fromkeys(weights, bare)
    if mapping.clip == "optimal" and has_errors(config):
        choose = functools.partial(
            _ranges, errors=errors or code_errors(config), top=_top(config)
        )
        for name, matrix in weights.items():
            ranges = jax.jit(one_by_one(choose, shape[:-1]))(matrix, squares, bare)
            prepared[name] = dataclasses.replace(bare, ranges=ranges)
    return {name: preparation.identified() for name, preparation in prepared.items()}


def expected_error(
    weights: Float[Array, "*N d_in d_out"],
    moments: Float[Array, "*N d_in"],
    config: CrossbarConfig,
    preparation: Preparation,
    *,
    errors: CodeErrors | None = None,
) -> Float[Array, "*N"]:
    """Return the expected error power over the power of the outputs, for uncorrelated inputs.

    Args:
      weights: the matrices.
      moments: mean square of each input.
      config: configuration of their arrays.
      preparation: their preparation; an empty one stands for none.
      errors: errors of the device (`code_errors`), if they are known.
    """
    errors = errors or code_errors(config)
    top = _top(config)

    def of_one(weights: Array, squares: Array, preparation: Preparation) -> Array:
        power = squares @ jnp.square(weights)
        prepared = preparation.weights(weights)
        squares = preparation.moments(squares)
        ranges = (
            _largest(prepared) if preparation.ranges is None else preparation.ranges
        )
        intended_power, along, programmed_power = _powers(
            prepared, ranges, squares, errors, top
        )
        intended_power = jnp.where(intended_power > 0, intended_power, 1)
        # The part of the errors that is along the weights meets their outputs, whose power a transform keeps.
        return jnp.sum(
            jnp.square(along / intended_power - 1) * power
            + programmed_power
            - jnp.square(along) / intended_power
        ) / jnp.sum(power)

    return jax.jit(one_by_one(of_one, weights.shape[:-2]))(
        weights, jnp.asarray(moments, jnp.float32), preparation
    )


def _ranges(
    weights: Float[Array, "d_in d_out"],
    squares: Float[Array, " d_in"],
    preparation: Preparation,
    errors: CodeErrors,
    top: int | None,
) -> Float[Array, " d_out"]:
    """Return the ranges of least error power among those that are tried."""
    prepared = preparation.weights(weights)
    shares = jnp.asarray(_CLIPS, weights.dtype)
    largest = _largest(prepared)

    def power(share: Array) -> Array:
        intended_power, along, programmed_power = _powers(
            prepared, share * largest, squares, errors, top
        )
        return intended_power - 2 * along + programmed_power

    return largest * shares[jnp.argmin(jax.lax.map(power, shares), axis=0)]


def _powers(
    weights: Float[Array, "d_in d_out"],
    ranges: Float[Array, " d_out"],
    squares: Float[Array, " d_in"],
    errors: CodeErrors,
    top: int | None,
) -> tuple[Float[Array, " d_out"], Float[Array, " d_out"], Float[Array, " d_out"]]:
    """Return the mean of y^2, of y z and of z^2 of each column, with y the digital output and z that of the cells."""
    ranges = ranges[None]
    codes = jnp.clip(weights / ranges, -1, 1)
    if top is not None:
        codes = jnp.round(codes * top) / top
    mean, variance = errors.at(codes)
    programmed = ranges * (codes + mean)
    noise_power = squares @ (jnp.square(ranges) * variance)
    return (
        squares @ jnp.square(weights),
        squares @ (weights * programmed),
        squares @ jnp.square(programmed) + noise_power,
    )


def _largest(weights: Float[Array, "d_in d_out"]) -> Float[Array, " d_out"]:
    """Return the largest weight of each column; 1 for zeros."""
    largest = jnp.max(jnp.abs(weights), axis=0)
    return jnp.where(largest > 0, largest, 1)


def _top(config: CrossbarConfig) -> int | None:
    """Return the largest integer code; None for real-valued weights."""
    bits = config.mapping.weight_bits
    return None if bits is None else 2 ** (bits - 1) - 1


def _spreading_factors(
    weights: Float[Array, "d_in d_out"], squares: Float[Array, " d_in"]
) -> Float[Array, " d_in"]:
    """Return a_i^2 = sqrt(s_i / sum_j w_ij^2), which minimise sum_ij a_i^2 w_ij^2 * sum_i s_i / a_i^2."""
    return _centred(
        jnp.sqrt(
            jnp.sqrt(
                squares / _floored(jnp.sum(jnp.square(weights), axis=1), _LEAST_ROW)
            )
        )
    )


def _largest_weight_factors(
    weights: Float[Array, "d_in d_out"], squares: Float[Array, " d_in"]
) -> Float[Array, " d_in"]:
    """Return a_i = s_i^(p / 2) of the p that minimises sum_j max_i (a_i |w_ij|)^2 * sum_i s_i / a_i^2."""

    def power(exponent: Array) -> Array:
        a = squares ** (exponent / 2)
        top = jnp.max(a[:, None] * jnp.abs(weights), axis=0)
        return jnp.sum(jnp.square(top)) * jnp.sum(squares / jnp.square(a))

    exponents = jnp.asarray(_POWERS, weights.dtype)
    return _centred(
        squares ** (exponents[jnp.argmin(jax.lax.map(power, exponents))] / 2)
    )


def _floored(
    squares: Float[Array, "*N d"], least: float = _LEAST_INPUT
) -> Float[Array, "*N d"]:
    """Return max(s_i, least * m), and m for zeros, with m the median of the positive numbers.

    An input that was almost silent in the text, but is of power m later, adds m / a^2 to sum_i s_i / a_i^2. With
    a^2 proportional to sqrt(s), that is m / sqrt(least * m) instead of sqrt(m): 3.2 times as much as its share for a
    `least` of 0.1, and 1,000 times for 1e-6, more than all others together.
    """
    median = jnp.nan_to_num(
        jnp.nanmedian(jnp.where(squares > 0, squares, jnp.nan), axis=-1, keepdims=True),
        nan=1.0,
    )
    return jnp.where(squares > 0, jnp.maximum(squares, least * median), median)


def _centred(factors: Float[Array, " d"]) -> Float[Array, " d"]:
    return factors / jnp.exp(jnp.mean(jnp.log(factors)))


def _shared_shape(
    matrices: Mapping[str, Float[Array, "*N d_in _cols"]],
) -> tuple[int, ...]:
    """Return [*N, d_in]; raises a ValueError for matrices that cannot share an input."""
    shapes = {name: tuple(weights.shape[:-1]) for name, weights in matrices.items()}
    if len({*shapes.values()}) != 1 or () in shapes.values():
        shape_texts = ", ".join(
            f"{name} {weights.shape}" for name, weights in matrices.items()
        )
        raise ValueError(
            f"matrices that share an input differ in d_out alone, but these are {shape_texts or 'none'}"
        )
    return next(iter(shapes.values()))


def _check_moments(moments: Float[Array, "..."] | None, shape: tuple[int, ...]) -> None:
    if moments is None:
        return
    if moments.shape != shape:
        raise ValueError(
            f"moments of shape {moments.shape}: expected {shape}, one for each input of the matrices"
        )
    values = np.asarray(moments)
    if bad := int(np.sum(~(values >= 0) | ~np.isfinite(values))):
        raise ValueError(
            f"{bad} of {values.size} moments are negative, NaN or infinite: give mean squares of inputs"
        )
