"""The baselines that merge modules without data: nothing is trained."""

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..adapters.basis import Pool
from ..adapters.coefficients import expand
from ..adapters.merges import MergeKind, check_merge, merge
from ..adapters.pool import LoraPool
from ..adapters.updates import LowRank
from ..support.checks import one_of
from ..training.frozen import Frozen
from ..training.method import Adapted, Fused, Index, Method, Params
from .entry import Built, MethodEntry
from .recipes import PoolRecipe


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


ENTRIES = (
    MethodEntry(
        name="merge",
        help="combine the modules by one of PEFT's rules",
        build=_build,
        recipe=MergeRecipe,
        pool=True,
        learns="given",
    ),
)
