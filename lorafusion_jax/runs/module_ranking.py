"""Ranking of modules by the gradient of the loss in their coefficients, at zero.

At zero coefficients a fusion is the base model. The gradient there shows how much a little of each module would help,
before anything is trained.

Axis letters: N modules of a fusion.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..loading.model import with_modules, with_whole_modules
from ..methods.entry import basis_of, modules_of
from ..methods.fusion import choice_of
from ..tasks import IGNORED, Batch
from ..training.fit import start
from ..training.loss import objective
from ..training.mesh import on_mesh, to_host
from ..training.method import SEARCH, Params
from ..training.problem import Problem, per_seed
from .folder import RunConfig
from .options import FuseOptions
from .setup import Setup


def with_ranked_modules(
    setup: Setup, options: FuseOptions, recorded: RunConfig | None
) -> Setup:
    """Return the setup with the modules of the resumed run, or with those that lower the loss fastest at c = 0."""
    if recorded is not None:
        return with_modules(setup, options, recorded["modules"])
    recipe = options.recipe
    ranked = setup
    if basis_of(recipe) is not None and choice_of(recipe) == "gradient":
        ranked = with_whole_modules(setup, options)
    batches = list(ranked.rows.once(recipe.batch_size))
    gradient = gradient_at_zero(ranked.problem, options.seeds, batches)
    gradient = np.sum(gradient, axis=tuple(range(2, gradient.ndim)))  # over columns
    first = np.argsort(gradient, axis=1, kind="stable")[:, : modules_of(recipe)]
    seed_modules = [
        [modules[i] for i in chosen]
        for modules, chosen in zip(ranked.modules, first.tolist(), strict=True)
    ]
    return with_modules(setup, options, seed_modules)


def gradient_at_zero(
    problem: Problem, seeds: tuple[int, ...], batches: Sequence[Batch]
) -> Float[np.ndarray, "seeds N *columns"]:
    """Return the gradient of the loss on some rows, in nats per answer token, in the coefficients at c = 0.

    Leaves of the batches have a leading axis of seeds. All tokens count alike, whatever batches their rows are in.
    """
    params = start(problem, seeds).params
    params = params | {"coefficients": jnp.zeros_like(params["coefficients"])}
    gradients = []
    for number, batch in enumerate(batches):
        read = problem.read(SEARCH, number)
        gradients.append(
            to_host(coefficient_gradients(params, on_mesh(batch, of_seeds=True), read))
        )
    tokens = np.stack(
        [np.sum(np.asarray(batch.labels) != IGNORED, axis=(1, 2)) for batch in batches]
    )
    return np.einsum(
        "bs,bs...->s...", tokens / np.sum(tokens, axis=0), np.stack(gradients)
    )


@per_seed
def coefficient_gradients(
    params: Params, batch: Batch, problem: Problem
) -> Float[Array, "N *columns"]:
    """Return the gradient of a batch's cross-entropy, in nats per token, in the coefficients."""

    def loss(coefficients: Array) -> Array:
        moved = params | {"coefficients": coefficients}
        return objective(moved, batch, problem)[1]["cross_entropy"]

    return jax.grad(loss)(params["coefficients"])
