"""The descent of the loss that modules give, from its gradient in their coefficients at zero.

At zero coefficients a fusion is the base model. The gradient there shows how much a little of each module would help,
before anything is trained.

Axis letters: N modules of a fusion.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..adapters.pool import LoraPool, rotated_pool
from ..methods.fusion import Fusion
from ..support.checks import at_least
from ..support.progress import progress
from ..tasks import IGNORED, Batch
from ..training.fit import start
from ..training.frozen import SEARCH
from ..training.loss import objective
from ..training.mesh import on_mesh, to_host
from ..training.method import Params
from ..training.problem import Problem, per_seed


class Descent(NamedTuple):
    """Descent of the loss that the modules of a fusion give, and that of their rotated copies.

    The descent of a module is the norm of the loss's gradient in the module's coefficients, where all coefficients are
    zero: the decrease of the loss for each unit of a small step, in the best direction. A coefficient of 1 is a whole
    module. A rotated copy keeps the singular values of every update, so both have the same unit.

    Attributes:
      modules: [N], nats per answer token.
      rotated: [draws, N], the same for rotated copies.
      loss: loss of the base model on the rows, in nats per answer token.
    """

    modules: Float[np.ndarray, " N"]
    rotated: Float[np.ndarray, "draws N"]
    loss: float


def descent(problem: Problem, batches: Sequence[Batch], *, key: Array, draws: int = 3) -> Descent:
    """Return the descent of a pool's modules and of their rotated copies on some rows, by one backward pass for each.

    Args:
      problem: problem of one seed, whose method is a `Fusion` with the composition `sum`.
      batches: all rows, each once.
      key: key of the rotations; draw number d of `rotated_pool` has the key `fold_in(key, d)`.
      draws: number of rotated copies.

    Raises:
      ValueError: the method is not such a fusion, the pool does not have whole modules, or there are no rows or draws.
    """
    method, pool = problem.method, problem.frozen.pool
    if not isinstance(method, Fusion) or not isinstance(pool, LoraPool) or pool.magnitude is not None:
        raise ValueError("the descent needs a fusion of whole LoRA modules without separate magnitudes (DoRA)")
    if method.composition != "sum":
        raise ValueError(f"a {method.composition} has no gradient at zero coefficients: use the composition sum")
    at_least(1, draws=draws)
    if not batches:
        raise ValueError("no rows to compute a descent from: give at least one batch")
    alone = problem.replace(method=dataclasses.replace(method, magnitudes=False), index=problem.index[None])
    problems = [alone]
    for draw in progress("rotated copies", range(draws)):
        # The same names, because others would make it another program.
        copy = dataclasses.replace(rotated_pool(pool, jax.random.fold_in(key, draw)), names=pool.names)
        frozen = dataclasses.replace(problem.frozen, pool=on_mesh(copy, problem.config))
        problems.append(alone.replace(frozen=frozen))
    of_seed = [jax.tree.map(lambda leaf: np.asarray(leaf)[None], batch) for batch in batches]
    of_problems = [gradient_at_zero(problem, (0,), of_seed) for problem in progress("backward passes", problems)]
    norms = [np.linalg.norm(gradient.reshape(len(gradient), -1), axis=1) for _, (gradient,) in of_problems]
    return Descent(modules=norms[0], rotated=np.stack(norms[1:]), loss=float(of_problems[0][0][0]))


def gradient_at_zero(
    problem: Problem, seeds: tuple[int, ...], batches: Sequence[Batch]
) -> tuple[Float[np.ndarray, " seeds"], Float[np.ndarray, "seeds N *columns"]]:
    """Return the loss on some rows, in nats per answer token, and its gradient in the coefficients at c = 0.

    Leaves of the batches have a leading axis of seeds. All tokens count alike, whatever batches their rows are in.
    """
    params = start(problem, seeds).params
    params = params | {"coefficients": jnp.zeros_like(params["coefficients"])}
    of_batches = []
    for number, batch in enumerate(batches):
        read = problem.read(SEARCH, number)
        of_batches.append(to_host(coefficient_gradients(params, on_mesh(batch, of_seeds=True), read)))
    losses, gradients = (np.stack(parts) for parts in zip(*of_batches, strict=True))
    tokens = np.stack([np.sum(np.asarray(batch.labels) != IGNORED, axis=(1, 2)) for batch in batches])
    weights = tokens / np.sum(tokens, axis=0)
    return np.sum(weights * losses, axis=0), np.einsum("bs,bs...->s...", weights, gradients)


@per_seed
def coefficient_gradients(
    params: Params, batch: Batch, problem: Problem
) -> tuple[Float[Array, ""], Float[Array, "N *columns"]]:
    """Return the cross-entropy of a batch, in nats per token, and its gradient in the coefficients."""

    def loss(coefficients: Array) -> Array:
        moved = params | {"coefficients": coefficients}
        return objective(moved, batch, problem, jnp.float32(0))[1]["cross_entropy"]

    return jax.value_and_grad(loss)(params["coefficients"])
