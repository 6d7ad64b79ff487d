"""Choice of the modules to fuse by one backward pass at c = 0, instead of a draw.

At zero coefficients a fusion is the base model, and the gradient of the loss in the coefficient of a module shows how
much a little of the module would help.

Axis letters: N modules.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..tasks import Batch
from ..training.fit import start
from ..training.frozen import SEARCH
from ..training.loss import objective
from ..training.mesh import on_mesh, to_host
from ..training.method import Params
from ..training.problem import Problem, per_seed
from .prepare import Setup


def choose_by_gradient(setup: Setup, seeds: tuple[int, ...], *, keep: int, batch_size: int) -> Setup:
    """Return the setup in which each seed fuses the `keep` modules of greatest descent, the greatest first.

    The seeds of the given setup have all modules of the pool, and its fusion is a sum.
    """
    gradient = gradients_at_zero(setup, seeds, batch_size=batch_size)
    chosen = most_descent(gradient, keep)
    names = [[modules[i] for i in row] for modules, row in zip(setup.modules, chosen.tolist(), strict=True)]
    index = np.take_along_axis(to_host(setup.problem.index), chosen, axis=1)
    asked = setup.with_problem(index=on_mesh(jnp.asarray(index), of_seeds=True))
    return dataclasses.replace(asked, modules=tuple(map(tuple, names)))


def most_descent(gradient: Float[np.ndarray, "seeds N *columns"], keep: int) -> Int[np.ndarray, "seeds keep"]:
    """Return the `keep` modules with the greatest descent of the loss, summed over columns of coefficients."""
    descent = -np.sum(gradient, axis=tuple(range(2, gradient.ndim)), dtype=float)
    return np.argsort(-descent, axis=1, kind="stable")[:, :keep]


def gradients_at_zero(
    setup: Setup, seeds: tuple[int, ...], *, batch_size: int
) -> Float[np.ndarray, "seeds N *columns"]:
    """Return the gradient of the training loss in the coefficients at c = 0, by one pass over each seed's rows."""
    params = start(setup.problem, seeds).params
    params = params | {"coefficients": jnp.zeros_like(params["coefficients"])}
    total = jnp.zeros_like(params["coefficients"])
    for number, batch in enumerate(setup.rows.once(batch_size)):
        read = setup.problem.read(SEARCH, number)
        total = total + coefficient_gradients(params, on_mesh(batch, of_seeds=True), read)
    return to_host(total)


@per_seed
def coefficient_gradients(params: Params, batch: Batch, problem: Problem) -> Float[Array, "N *columns"]:
    """Return the gradient of the loss in the coefficients, on a batch."""

    def loss(coefficients: Array) -> Array:
        moved = params | {"coefficients": coefficients}
        return objective(moved, batch, problem, jnp.float32(0))[0]

    return jax.grad(loss)(params["coefficients"])
