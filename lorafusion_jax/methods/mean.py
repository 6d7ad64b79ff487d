"""The mean of the modules, with trained coefficients or as it is; and the best single module by its training loss.

Axis letters: N modules of a seed.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from ..adapters.coefficients import expand
from ..adapters.pool import LoraPool
from ..tasks import IGNORED, Batch
from ..training.frozen import SEARCH, Frozen
from ..training.loss import seed_entropies
from ..training.mesh import on_mesh, to_host
from ..training.method import Adapted, Fused, Index, Params
from ..training.problem import Problem
from .entry import MethodEntry, SearchJob
from .fusion import PLAIN_SUM, Fusion, FusionRecipe, build
from .recipes import BasisRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFusion(Fusion):
    """A control of LoRAFusion: one module, the mean of the N, with its coefficients and magnitudes.

    Groups: `mean`, its coefficients in the shape of the granularity without the axis N; otherwise as `Fusion`. It
    starts where the fusion of N modules does.
    """

    def learning_rates(self, recipe: Any) -> dict[str, float]:
        rates = super().learning_rates(recipe)
        return {"mean": rates.pop("coefficients")} | rates

    def init(self, frozen: Frozen, index: Index, key: PRNGKeyArray) -> Params:
        params = super().init(frozen, index, key)
        return {"mean": jnp.sum(params.pop("coefficients"), axis=0)} | params

    def adapters(self, params: Params, frozen: Frozen, index: Index) -> Adapted:
        return super().adapters(_alike(params, len(index)), frozen, index)

    def as_fusion(self, params: Params, frozen: Frozen, index: Index) -> Fused | None:
        if not isinstance(frozen.pool, LoraPool):
            return None
        return expand(
            _alike(params, len(index))["coefficients"], frozen.pool, self.granularity
        ), self.composition

    def trainable(self, params: Params, frozen: Frozen, index: Index) -> Params:
        acting = super().trainable(_alike(params, len(index)), frozen, index)
        return {"mean": jnp.any(acting.pop("coefficients"), axis=0)} | acting


def _alike(params: Params, modules: int) -> Params:
    """Return the numbers of the fusion that gives each of N modules an N-th of the coefficients."""
    rest = dict(params)
    mean = params["mean"]
    del rest["mean"]
    return rest | {
        "coefficients": jnp.broadcast_to(mean / modules, (modules, *mean.shape))
    }


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
    MethodEntry(
        name="mean-fusion",
        help="train coefficients of the modules' mean, and magnitudes",
        build=partial(build, kind=MeanFusion),
        recipe=FusionRecipe,
        pool=True,
        groups=("magnitudes", "mean"),
    ),
    dataclasses.replace(
        _MEAN,
        name="single",
        help="take the module of least training loss",
        learns="searched",
        search=_search,
        evaluations=lambda recipe, modules: modules,
    ),
)
