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

_CLIPS = np.linspace(1, 0.3, 71)  # tried as shares of a column's largest weight
_BINS = 4096  # of a column's weights
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
    transforms = mapping.transform == "hadamard"
    weights = {name: jnp.asarray(w, jnp.float32) for name, w in matrices.items()}
    if moments is None:
        squares = jnp.ones(shape)
    else:
        squares = _floored(jnp.asarray(moments, jnp.float32))
    factors = jnp.ones(shape)
    if mapping.factors:
        columns = jnp.concatenate(list(weights.values()), axis=-1)
        if transforms:
            factors = _spreading_factors(columns, squares)
        else:
            factors = _largest_weight_factors(columns, squares)
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
        errors = errors or code_errors(config)
        for name, matrix in weights.items():
            ranges = _ranges(matrix, squares, bare, errors, _top(config))
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
    unnamed = dataclasses.replace(preparation, identity="", white=False)
    errors = errors or code_errors(config)
    squares = jnp.asarray(moments, jnp.float32)
    return _expected_error(weights, squares, unnamed, errors, _top(config))


@functools.partial(jax.jit, static_argnames="top")
def _expected_error(
    weights: Float[Array, "*N d_in d_out"],
    squares: Float[Array, "*N d_in"],
    preparation: Preparation,
    errors: CodeErrors,
    top: int | None,
) -> Float[Array, "*N"]:
    def of_one(weights: Array, squares: Array, preparation: Preparation) -> Array:
        power = squares @ jnp.square(weights)
        prepared = preparation.weights(weights)
        squares = preparation.moments(squares)
        ranges = (
            _largest(prepared) if preparation.ranges is None else preparation.ranges
        )
        programmed, variance = _programmed(prepared / ranges[None], errors, top)
        mean_error = ranges[None] * programmed - prepared
        square_error = jnp.square(mean_error) + jnp.square(ranges)[None] * variance
        # The part of the errors that is along the weights meets their outputs, whose power a transform keeps.
        intended_power = squares @ jnp.square(prepared)
        along = squares @ (prepared * mean_error)
        share_along = along / jnp.where(intended_power > 0, intended_power, 1)
        return jnp.sum(
            squares @ square_error + jnp.square(share_along) * (power - intended_power)
        ) / jnp.sum(power)

    return one_by_one(of_one, weights.shape[:-2])(weights, squares, preparation)


@functools.partial(jax.jit, static_argnames="top")
def _ranges(
    weights: Float[Array, "*N d_in d_out"],
    squares: Float[Array, "*N d_in"],
    preparation: Preparation,
    errors: CodeErrors,
    top: int | None,
) -> Float[Array, "*N d_out"]:
    """Return the ranges of least error power among those that are tried, from histograms of the columns' weights."""
    shares = jnp.asarray(_CLIPS, jnp.float32)
    centres = jnp.linspace(-1, 1, _BINS)
    ranges = shares[:, None]
    programmed, variance = _programmed(centres[None] / ranges, errors, top)
    mean_error = ranges * programmed - centres[None]
    powers = jnp.square(mean_error) + jnp.square(ranges) * variance  # [shares, bins]

    def of_one(weights: Array, squares: Array, preparation: Preparation) -> Array:
        prepared = preparation.weights(weights)
        largest = _largest(prepared)
        columns = prepared.T
        places = (columns / largest[:, None] + 1) / 2 * (_BINS - 1)
        column = jnp.arange(len(columns))[:, None]
        histograms = jnp.zeros((len(columns), _BINS))
        histograms = histograms.at[column, jnp.round(places).astype(jnp.int32)].add(
            squares[None]
        )
        return largest * shares[jnp.argmin(histograms @ powers.T, axis=1)]

    return one_by_one(of_one, weights.shape[:-2])(weights, squares, preparation)


def _programmed(
    scaled: Float[Array, "*S"], errors: CodeErrors, top: int | None
) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """Return mean and variance of programmed weights over chips, in units of their range as those to be written."""
    codes = jnp.clip(scaled, -1, 1)
    if top is not None:
        codes = jnp.round(codes * top) / top
    last = len(errors.mean) - 1
    nearest = jnp.round((codes + 1) / 2 * last).astype(jnp.int32)
    mean = jnp.asarray(errors.mean, codes.dtype)[nearest]
    return codes + mean, jnp.asarray(errors.variance, codes.dtype)[nearest]


def _largest(weights: Float[Array, "d_in d_out"]) -> Float[Array, " d_out"]:
    """Return the largest weight of each column; 1 for zeros."""
    largest = jnp.max(jnp.abs(weights), axis=0)
    return jnp.where(largest > 0, largest, 1)


def _top(config: CrossbarConfig) -> int | None:
    """Return the largest integer code; None for real-valued weights."""
    bits = config.mapping.weight_bits
    return None if bits is None else 2 ** (bits - 1) - 1


def _spreading_factors(
    weights: Float[Array, "*N d_in d_out"], squares: Float[Array, "*N d_in"]
) -> Float[Array, "*N d_in"]:
    """Return a_i^2 = sqrt(s_i / sum_j w_ij^2), which minimise sum_ij a_i^2 w_ij^2 * sum_i s_i / a_i^2."""
    rows = jnp.einsum("...ij,...ij->...i", weights, weights)
    return _centred((squares / _floored(rows, _LEAST_ROW)) ** 0.25)


@jax.jit
def _largest_weight_factors(
    weights: Float[Array, "*N d_in d_out"], squares: Float[Array, "*N d_in"]
) -> Float[Array, "*N d_in"]:
    """Return a_i = s_i^(p / 2) of the p that minimises sum_j max_i (a_i |w_ij|)^2 * sum_i s_i / a_i^2."""
    exponents = jnp.asarray(_POWERS, jnp.float32)

    def of_one(weights: Array, squares: Array) -> Array:
        def power(exponent: Array) -> Array:
            a = squares ** (exponent / 2)
            top = jnp.max(a[:, None] * jnp.abs(weights), axis=0)
            return jnp.sum(jnp.square(top)) * jnp.sum(squares / jnp.square(a))

        best = exponents[jnp.argmin(jax.lax.map(power, exponents))]
        return _centred(squares ** (best / 2))

    return one_by_one(of_one, squares.shape[:-1])(weights, squares)


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


def _centred(factors: Float[Array, "*N d"]) -> Float[Array, "*N d"]:
    return factors / jnp.exp(jnp.mean(jnp.log(factors), axis=-1, keepdims=True))


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
