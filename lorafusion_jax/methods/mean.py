"""The mean of the modules, and the best single module by its training loss.

Axis letters: N modules of a seed.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..tasks import IGNORED, Batch
from ..training.frozen import SEARCH
from ..training.loss import seed_entropies
from ..training.mesh import on_mesh, to_host
from ..training.method import Params
from ..training.problem import Problem
from .entry import MethodEntry, SearchJob
from .fusion import PLAIN_SUM
from .recipes import BasisRecipe


def single_losses(
    batches: Sequence[Batch], problem: Problem
) -> Float[np.ndarray, "seeds N"]:
    """Return the training loss of every module alone, in nats per token; batches have a leading axis of seeds."""
    seeds, modules = problem.index.shape
    total = np.zeros((seeds, modules))
    targets = np.zeros(seeds)
    for number, batch in enumerate(batches):
        count = np.sum(batch.labels != IGNORED, axis=(1, 2))
        read = problem.read(SEARCH, number)
        batch = on_mesh(batch, of_seeds=True)
        for n in range(modules):
            params = on_mesh(
                {"coefficients": jnp.tile(jax.nn.one_hot(n, modules), (seeds, 1))},
                of_seeds=True,
            )
            total[:, n] += (
                to_host(seed_entropies(params, batch, read)).astype(float) * count
            )
        targets += count
    return total / targets[:, None]


def _search(job: SearchJob) -> tuple[Params, int]:
    losses = single_losses(list(job.rows.once(job.recipe.batch_size)), job.problem)
    job.record(
        {
            "step": n + 1,
            "seed": seed,
            "score": losses[s, n].item(),
            "module": job.modules[s][n],
        }
        for s, seed in enumerate(job.seeds)
        for n in range(losses.shape[1])
    )
    best = np.argmin(np.where(np.isfinite(losses), losses, np.inf), axis=1)
    return {"coefficients": jax.nn.one_hot(best, losses.shape[1])}, losses.shape[1]


_MEAN = MethodEntry(
    name="mean",
    help="weigh all modules alike",
    build=lambda built: PLAIN_SUM,
    recipe=BasisRecipe,
    pool=True,
    learns="given",
)
ENTRIES = (
    _MEAN,
    dataclasses.replace(
        _MEAN,
        name="single",
        help="take the module of least training loss",
        learns="searched",
        search=_search,
        evaluations=lambda recipe, modules: modules,
    ),
)
