"""One weight for every module, without training: all alike, or the best single module by its training loss.

Axis letters: N modules of a seed.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..tasks import IGNORED, Batch
from ..training.loss import seed_entropies
from ..training.mesh import on_mesh, to_host
from ..training.problem import SEARCH, Params, Problem
from .fusion import Fusion
from .method import MethodEntry, SearchJob, fused


def single_losses(batches: Sequence[Batch], problem: Problem) -> Float[np.ndarray, "seeds N"]:
    """Return every module's training loss by itself, in nats per token.

    Args:
      batches: of every seed's rows, leaves with a leading axis of seeds.
      problem: of all seeds; its method is a fusion whose coefficients are one for each module.
    """
    seeds, modules = problem.index.shape
    total, targets = np.zeros((seeds, modules)), np.zeros(seeds)
    for number, batch in enumerate(batches):
        count = np.sum(batch.labels != IGNORED, axis=(1, 2))
        read, batch = problem.read(SEARCH, number), on_mesh(batch, of_seeds=True)
        for n in range(modules):
            params = on_mesh({"coefficients": jnp.tile(jax.nn.one_hot(n, modules), (seeds, 1))}, of_seeds=True)
            total[:, n] += to_host(seed_entropies(params, batch, read)).astype(float) * count
        targets += count
    return total / targets[:, None]


def _search(job: SearchJob) -> tuple[Params, int]:
    losses = single_losses(list(job.rows.once(job.recipe.batch_size)), job.problem)
    job.record(
        {"step": n + 1, "seed": seed, "score": losses[s, n].item(), "module": job.modules[s][n]}
        for s, seed in enumerate(job.seeds)
        for n in range(losses.shape[1])
    )
    best = np.argmin(losses, axis=1)
    return {"coefficients": jax.nn.one_hot(best, losses.shape[1])}, losses.shape[1]


ENTRIES = (
    MethodEntry(
        name="mean",
        help="weigh all modules alike",
        build=lambda built: Fusion(granularity="global", magnitudes=False),
        update=lambda recipe, modules: fused(recipe, modules, "sum"),
        pool=True,
        in_basis=True,
        learns="given",
    ),
    MethodEntry(
        name="single",
        help="take the module of least training loss",
        build=lambda built: Fusion(granularity="global", magnitudes=False),
        update=lambda recipe, modules: fused(recipe, modules, "sum"),
        pool=True,
        in_basis=True,
        learns="searched",
        counts=False,
        search=_search,
        evaluations=lambda recipe, modules: modules,
    ),
)
