"""Every seed on every chip, as the seeds of one program: chip 0's seeds first, then chip 1's, ..."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ..crossbar import Rules
from ..runs.prepare import Setup
from ..tasks import Split
from ..training.problem import Params
from .calibration import calibrate
from .chips import limits_of, program_chips
from .program import Norms, program
from .setup import CALIBRATION_ROWS

_Tree = TypeVar("_Tree")


def on_every_chip(
    setup: Setup,
    params: Params,
    rules: Rules,
    keys: Array,
    *,
    modules: Int[Array, " P"] | None,
    norm: Norms,
    calibration_rows: int = CALIBRATION_ROWS,
) -> Setup:
    """Return the setup of S seeds on C chips: C * S seeds, each with a chip.

    ADC ranges are calibrated on the first chip, and are those of all.

    Args:
      setup: digital, with a loop over layers.
      params: of its seeds, which the ranges are to cover.
      rules: of all chips (see `program`).
      keys: [C], of the chips.
      modules: the numbers that the pool's modules have on the chips.
      norm: weights that the magnitudes' norms are computed from.
      calibration_rows: training rows that the ranges are calibrated on.
    """
    problem = setup.problem
    first = program(problem.graph, problem.frozen, rules, keys[0], modules=modules, norm=norm)
    limits = limits_of(calibrate(setup, params, first, rows=calibration_rows))
    count, seeds = len(keys), len(problem.index)
    chip_of_seed = jnp.repeat(jnp.arange(count), seeds)
    frozen = program_chips(
        problem.graph, problem.frozen, [rules] * count, keys, chip_of_seed, limits=limits, modules=modules, norm=norm
    )
    split = setup.split and Split(*(np.tile(rows, (count, 1)) for rows in setup.split))
    on_all = setup.posing(frozen=frozen, index=jnp.tile(problem.index, (count, 1)))
    return dataclasses.replace(on_all, split=split)


def for_every_chip(tree: _Tree, count: int) -> _Tree:
    """Return leaves of S seeds again for each of `count` chips."""
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf] * count), tree)
