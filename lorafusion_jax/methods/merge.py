"""Baselines that combine modules without training: PEFT's merges, the mean, and the best module by its training loss.

Axis letters: N modules of a seed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ..adapters.basis import Pool
from ..adapters.coefficients import expand
from ..adapters.merges import MergeKind, check_merge, merge
from ..adapters.pool import LoraPool
from ..adapters.updates import LowRank
from ..support.checks import one_of
from ..tasks import IGNORED, Batch
from ..training.loss import seed_entropies
from ..training.mesh import on_mesh, to_host
from ..training.method import SEARCH, Adapted, Frozen, Fused, Index, Method, Params
from ..training.problem import Problem
from .entry import BasisRecipe, Built, MethodEntry, PoolRecipe, SearchJob
from .fusion import PLAIN_SUM


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeRecipe(PoolRecipe):
    """Recipe of a merge.

    Attributes:
      merge: PEFT's rule, with all modules at 1 / N.
      density: share of the entries that ties, dare and magnitude_prune keep.
    """

    merge: MergeKind = "linear"
    density: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(Method):
    """A merge of the modules, made once: every weight is 1 / N, and nothing is trained or counted.

    Group `merged`: A and B of the result; `cat` reads the pool itself, and its group is `weights` [N]. The key of
    `init` draws the masks of dare.

    Attributes:
      kind: rule (see `adapters.merges`).
      density: share of the entries that ties, dare and magnitude_prune keep.
    """

    kind: MergeKind
    density: float = 0.5

    def __post_init__(self) -> None:
        one_of(get_args(MergeKind), kind=self.kind)
        if not 0 < self.density <= 1:
            raise ValueError(
                f"density is {self.density}: give the share of entries to keep, above 0 and up to 1"
            )

    def check(self, pool: Pool) -> None:
        check_merge(_whole(pool), self.kind)

    def init(self, frozen: Frozen, index: Index, key: PRNGKeyArray) -> Params:
        weights = jnp.full(index.shape[0], 1 / index.shape[0])
        if self.kind == "cat":
            return {"weights": weights}
        merged = self._merge(frozen, index, weights, key)
        factors = {
            site: lora for site, lora in merged.items() if isinstance(lora, LowRank)
        }
        return {
            "merged": {
                "A": {s: m.A for s, m in factors.items()},
                "B": {s: m.B for s, m in factors.items()},
            }
        }

    def adapters(self, params: Params, frozen: Frozen, index: Index) -> Adapted:
        if self.kind == "cat":
            return self._merge(
                frozen, index, jax.lax.stop_gradient(params["weights"]), None
            ), {}
        A = jax.lax.stop_gradient(params["merged"]["A"])
        B = jax.lax.stop_gradient(params["merged"]["B"])
        return {site: LowRank(A[site], B[site]) for site in A}, {}

    def as_fusion(self, params: Params, frozen: Frozen, index: Index) -> Fused | None:
        if self.kind != "cat":
            return None
        return expand(params["weights"], _whole(frozen.pool), "global"), "sum"

    def trainable(self, params: Params, frozen: Frozen, index: Index) -> Params:
        return jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)

    def _merge(
        self,
        frozen: Frozen,
        index: Index,
        weights: Float[Array, " N"],
        key: Array | None,
    ) -> dict[str, Any]:
        return merge(
            _whole(frozen.pool),
            index,
            weights,
            self.kind,
            density=self.density,
            key=key,
        )


def _whole(pool: Pool | None) -> LoraPool:
    if not isinstance(pool, LoraPool):
        raise ValueError(
            "a merge needs a pool of whole modules: give Frozen(base, pool) a LoraPool"
        )
    return pool


def _build(built: Built) -> Merge:
    method = Merge(kind=built.recipe.merge, density=built.recipe.density)
    assert built.pool is not None
    method.check(built.pool)
    return method


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
    MethodEntry(
        name="merge",
        help="combine the modules by one of PEFT's rules",
        build=_build,
        recipe=MergeRecipe,
        pool=True,
        learns="given",
    ),
)
