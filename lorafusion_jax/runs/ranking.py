"""Choice of the modules to fuse by one backward pass at c = 0, instead of a draw.

Axis letters: N modules.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ..training.mesh import on_mesh, to_host
from .descent import gradients_at_zero
from .prepare import Setup


def choose_by_gradient(setup: Setup, seeds: tuple[int, ...], *, keep: int, batch_size: int) -> Setup:
    """Return the setup in which each seed fuses the `keep` modules of greatest descent, the greatest first.

    The seeds of the given setup have all modules of the pool, and its fusion is a sum.
    """
    batches = gradients_at_zero(setup.problem, seeds, setup.rows.once(batch_size))
    chosen = most_descent(np.sum([gradient for _, gradient in batches], axis=0), keep)
    names = [[modules[i] for i in row] for modules, row in zip(setup.modules, chosen.tolist(), strict=True)]
    index = np.take_along_axis(to_host(setup.problem.index), chosen, axis=1)
    asked = setup.with_problem(index=on_mesh(jnp.asarray(index), of_seeds=True))
    return dataclasses.replace(asked, modules=tuple(map(tuple, names)))


def most_descent(gradient: Float[np.ndarray, "seeds N *columns"], keep: int) -> Int[np.ndarray, "seeds keep"]:
    """Return the `keep` modules with the greatest descent of the loss, summed over columns of coefficients."""
    descent = -np.sum(gradient, axis=tuple(range(2, gradient.ndim)), dtype=float)
    return np.argsort(-descent, axis=1, kind="stable")[:, :keep]
