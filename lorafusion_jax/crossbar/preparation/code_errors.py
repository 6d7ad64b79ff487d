"""Mean and variance of a programmed weight at each code, over chips."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..chip.chip import programmed_weights
from ..chip.program import has_errors, program
from ..config.schema import CrossbarConfig, Mapping, Tile
from ..config.structure import split_config

_CODES = 255  # at most
_DRAWS = 1024


class CodeErrors(NamedTuple):
    """Errors of programmed weights, in units of their column's range.

    Attributes:
      mean: mean error at codes from -1 to 1 of the range, at distances that rounding alone makes unequal.
      variance: variance of the error there.
    """

    mean: Float[np.ndarray, " codes"]
    variance: Float[np.ndarray, " codes"]


def code_errors(config: CrossbarConfig) -> CodeErrors:
    """Return the errors of the device at the age that the configuration gives, from draws with a fixed key.

    A matrix that holds every code in each column is programmed. So all that programming does is in it: the codes'
    digits, unused cells, stuck ones, flipped columns, write-verify, drift and its compensation.
    """
    if config.mapping.weight_bits:
        top = 2 ** (config.mapping.weight_bits - 1) - 1
    else:
        top = _CODES // 2
    codes = (
        np.unique(np.round(np.linspace(-1, 1, min(2 * top + 1, _CODES)) * top)) / top
    )
    place = np.arange(len(codes))[:, None] + np.arange(_DRAWS)[None]
    weights = jnp.asarray(codes[place % len(codes)], jnp.float32)
    plain = dataclasses.replace(
        config,
        mapping=Mapping(weight_bits=config.mapping.weight_bits, scale="column"),
        tile=Tile(rows=None, cols=None),
        adc=None,
        device=dataclasses.replace(config.device, read_noise=None),
    )
    programmed = np.asarray(
        programmed_weights(program(weights, plain, jax.random.key(0)))
    )
    rolled = np.stack(
        [np.roll(column, number) for number, column in enumerate(programmed.T)]
    )  # [draws, codes]
    return CodeErrors(rolled.mean(axis=0) - codes, rolled.var(axis=0, ddof=1))


def unused_levels(config: CrossbarConfig) -> str | None:
    """Return a sentence on weight slices whose top level no weight reaches, with the bits to use; None without any.

    The factor in error power is that of the configuration's device, for weights with a standard deviation of a third
    of their range.
    """
    bits = config.stored_bits
    if bits is None:
        return None
    used = []
    left = bits
    for width in config.weight_slices:
        used.append(min(width, left))
        left -= used[-1]
    if tuple(used) == config.weight_slices:
        return None
    full = tuple(width for width in used if width)
    fitting = dataclasses.replace(
        config,
        cell=dataclasses.replace(
            config.cell, bits=full, residual=config.cell.residual and len(full) > 1
        ),
    )
    gain = ""
    if has_errors(config) and not split_config(config)[1]:  # no swept values
        factor = _mean_power(fitting) / _mean_power(config)
        gain = f", and multiply the error power of the cells by {factor:.2g}"
    return (
        f"cell.bits = {list(config.weight_slices)} (least significant first) hold more than the {bits} bits of a "
        f"weight, so that top levels are never used: {list(full)} would use every level{gain}"
    )


def _mean_power(config: CrossbarConfig) -> float:
    """Return the mean square of a code's error, over normal weights."""
    errors = code_errors(config)
    codes = np.linspace(-3, 3, len(errors.mean))
    return float(
        np.average(
            np.square(errors.mean) + errors.variance,
            weights=np.exp(-np.square(codes) / 2),
        )
    )
