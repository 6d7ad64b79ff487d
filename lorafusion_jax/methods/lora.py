"""LoRA: one new low-rank module, trained from scratch or from a fusion; with magnitudes it is DoRA."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from ..adapters.pool import LoraPool
from ..adapters.truncation import Factors, factors_of, truncated
from ..adapters.updates import LowRank, WeightDecomposed
from ..models.architecture import Site, kernels
from ..models.weights import Weight
from ..support.text import some
from ..training.mesh import to_host
from ..training.method import Adapted, Frozen, Index, Method, Params
from ..training.problem import Problem
from ..training.recipe import Recipe
from .base_alone import with_norms
from .entry import (
    Built,
    CostLayout,
    MethodEntry,
    RescalingRecipe,
    TargetedRecipe,
    module,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRARecipe(TargetedRecipe):
    """Recipe of LoRA.

    Attributes:
      lora_rank: rank of the new module, whose alpha is twice that.
      warm_start: start from a `fusion` of the pool, which is trained first, for half of the epochs and at its own
        default rates; or from the `single` module of the pool with the least training loss, at the pool's largest rank.
      lr_lora: learning rate of the module's matrices. Tuned: 0.002 on the embedded base with 95 rows and 0.0001 with
        five, 0.005 on HuggingFaceTB/SmolLM2-135M-Instruct.
    """

    lora_rank: int = 16
    warm_start: Literal["none", "fusion", "single"] = "none"
    lr_lora: float = 2e-3

    def check(self) -> None:
        super().check()
        if self.warm_start == "fusion" and self.epochs < 2:
            raise ValueError(
                "--warm-start fusion divides the epochs into two parts: give 2 or more"
            )


def is_warm(recipe: Recipe) -> TypeGuard[LoRARecipe]:
    """Return whether a recipe is one of a LoRA that starts from the pool of the same run."""
    return isinstance(recipe, LoRARecipe) and recipe.warm_start != "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRARecipe(RescalingRecipe, LoRARecipe):
    """Recipe of DoRA."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """One new module, initialised as in PEFT.

    Groups: `lora`, A uniform within d_in ** -0.5, and B zeros; for DoRA also `magnitudes`, site -> [L, d_out].

    Attributes:
      sites: adapted linear maps.
      rank: r.
      alpha: dW = alpha / r * A B.
      dora: train the magnitudes as well: y = m / ||W + dW|| * x (W + dW), the norm taken as constant.
    """

    sites: tuple[tuple[str, Site], ...]
    rank: int = 16
    alpha: float = 32.0
    dora: bool = False

    def precompute(self, frozen: Frozen, kernels: Mapping[str, Weight]) -> Frozen:
        if self.dora:
            return with_norms(frozen, kernels, [name for name, _ in self.sites])
        return frozen

    def init(self, frozen: Frozen, index: Index, key: PRNGKeyArray) -> Params:
        keys = jax.random.split(key, len(self.sites))
        bounds = {name: site.d_in**-0.5 for name, site in self.sites}
        A = {
            name: jax.random.uniform(
                k,
                (site.layers, site.d_in, self.rank),
                jnp.float32,
                -bounds[name],
                bounds[name],
            )
            for (name, site), k in zip(self.sites, keys, strict=True)
        }
        B = {
            name: jnp.zeros((site.layers, self.rank, site.d_out))
            for name, site in self.sites
        }
        params: Params = {"lora": {"A": A, "B": B}}
        if self.dora:
            assert frozen.norms is not None
            params["magnitudes"] = {name: frozen.norms[name] for name, _ in self.sites}
        return params

    def start_at(
        self, source: Problem, source_params: Params, fresh: Params
    ) -> tuple[Params, list[dict[str, float]]]:
        """Return the parameters whose model is that of another method at this rank, and what the rank leaves out.

        Scales of columns are a part of A B, or of the magnitudes of a DoRA. Sites and ranks that the other method does
        not use keep their fresh parameters.

        Args:
          source: problem of the other method, on the same base; the leaves of all parameters have an axis of its seeds.
          source_params: its parameters.
          fresh: parameters of this method, from `init`.

        Returns:
          The parameters, and for each seed and site the share of the squared norm of the difference of both matrices
          that is left out.

        Raises:
          ValueError: the other method adapts no site, or one that this one does not.
        """
        starts = []
        left_out = []
        pool = source.frozen.pool
        model = nnx.merge(source.graph, source.frozen.base)
        base = kernels(model, pool.sites if pool else ())
        for place, index in enumerate(source.index):
            seed_params = jax.tree.map(lambda p, at=place: p[at], source_params)
            start = jax.tree.map(lambda p, at=place: p[at], fresh)
            factors = to_host(_factors(seed_params, source.replace(index=index)))
            if not factors:
                raise ValueError("it adapts no matrices")
            if outside := [name for name in factors if name not in dict(self.sites)]:
                raise ValueError(
                    f"it adapts {some(outside)}, which --lora-targets leaves out: add them"
                )
            shares = {}
            for site, site_factors in factors.items():
                # whole in every process
                kernel = jax.tree.map(jnp.asarray, to_host(base[site]))
                update = truncated(
                    site_factors, kernel, self.rank, rescaled=not self.dora
                )
                used = np.any(update.B != 0, axis=2)[:, None]
                lora = start["lora"]
                lora["A"][site] = jnp.where(used, update.A, lora["A"][site])
                lora["B"][site] = jnp.asarray(update.B * (self.rank / self.alpha))
                if self.dora:
                    start["magnitudes"][site] = jnp.asarray(update.norms)
                shares[site] = update.left_out
            starts.append(start)
            left_out.append(shares)
        return jax.tree.map(lambda *p: jnp.stack(p), *starts), left_out

    def adapters(self, params: Params, frozen: Frozen, index: Index) -> Adapted:
        A = params["lora"]["A"]
        B = params["lora"]["B"]
        B = {site: b * (self.alpha / self.rank) for site, b in B.items()}
        if self.dora:
            return {
                site: WeightDecomposed(A[site], B[site], params["magnitudes"][site])
                for site in A
            }, {}
        return {site: LowRank(A[site], B[site]) for site in A}, {}


@jax.jit
def _factors(params: Params, problem: Problem) -> dict[str, Factors]:
    return factors_of(problem.method.adapters(params, problem.frozen, problem.index)[0])


def as_pool(method: LoRA, params: Params, names: Sequence[str]) -> LoraPool:
    """Return trained LoRAs, leaves with a leading axis of seeds, as the modules of a pool."""
    A: dict[str, Weight] = {
        site: jnp.moveaxis(a, 0, 1) for site, a in params["lora"]["A"].items()
    }
    scale = method.alpha / method.rank
    B: dict[str, Weight] = {
        site: jnp.moveaxis(b, 0, 1) * scale for site, b in params["lora"]["B"].items()
    }
    ranks = {
        site: jnp.full(weight.shape[:2], method.rank, jnp.int32)
        for site, weight in A.items()
    }
    return LoraPool(A=A, B=B, rank=ranks, names=tuple(names))


def _build(built: Built) -> LoRA:
    rank = built.recipe.lora_rank
    dora = isinstance(built.recipe, DoRARecipe)
    return LoRA(sites=built.sites, rank=rank, alpha=2.0 * rank, dora=dora)


def _lora_cost_layouts(recipe: LoRARecipe, rank: int) -> dict[str, CostLayout]:
    matrices = module(recipe.lora_rank)
    return {
        "LoRA in cells": CostLayout(matrices=matrices, written="once"),
        "LoRA in cells, every step": CostLayout(
            matrices=matrices, written="every step", trains_in_arrays=True
        ),
        "LoRA in SRAM": CostLayout(digital=matrices),
    }


ENTRIES = (
    MethodEntry(
        name="lora",
        help="train one new low-rank module",
        title="LoRA, rank {lora_rank}",
        build=_build,
        recipe=LoRARecipe,
        groups=("lora",),
        cost_layouts=_lora_cost_layouts,
    ),
    MethodEntry(
        name="dora",
        help="train one new low-rank module, and magnitudes",
        title="DoRA, rank {lora_rank}",
        build=_build,
        recipe=DoRARecipe,
        groups=("lora", "magnitudes"),
        cost_layouts=lambda recipe, rank: {
            "DoRA in cells": CostLayout(
                matrices=module(recipe.lora_rank), written="once"
            )
        },
    ),
)
