"""Choice of the modules to fuse by one backward pass at c = 0, instead of a draw.

Axis letters: N modules.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ..training.mesh import on_mesh, to_host
from .descent import gradient_at_zero
from .prepare import Setup


def choose_by_gradient(setup: Setup, seeds: tuple[int, ...], *, keep: int, batch_size: int) -> Setup:
    """Return the setup in which each seed fuses the `keep` modules of greatest descent, the greatest first.

    The seeds of the given setup have all modules of the pool, and its fusion is a sum.
    """
    _, gradient = gradient_at_zero(setup.problem, seeds, list(setup.rows.once(batch_size)))
    descent = -np.sum(gradient, axis=tuple(range(2, gradient.ndim)))  # over columns of coefficients
    chosen = np.argsort(-descent, axis=1, kind="stable")[:, :keep]
    names = [[modules[i] for i in row] for modules, row in zip(setup.modules, chosen.tolist(), strict=True)]
    index = np.take_along_axis(to_host(setup.problem.index), chosen, axis=1)
    asked = setup.with_problem(index=on_mesh(jnp.asarray(index), of_seeds=True))
    return dataclasses.replace(asked, modules=tuple(map(tuple, names)))
