"""The gradient of the loss in the coefficients of modules, at zero.

At zero coefficients a fusion is the base model. The gradient there shows how much a little of each module would help,
before anything is trained.

Axis letters: N modules of a fusion.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..tasks import IGNORED, Batch
from .fit import start
from .frozen import SEARCH
from .loss import objective
from .mesh import on_mesh, to_host
from .method import Params
from .problem import Problem, per_seed


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
