"""LoRA, the baseline: one new low-rank module, trained from scratch; with magnitudes it is DoRA."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..adapters.updates import LowRank, WeightDecomposed
from ..models.architecture import Site
from .method import Frozen, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """One new module, as PEFT starts it.

    Groups: `lora`, A uniform within d_in ** -0.5, and B zeros; for DoRA also `magnitudes`, site -> [L, d_out].

    Attributes:
      sites: which linear maps, with their shapes.
      rank: r.
      alpha: dW = alpha / r * A B.
      dora: train the magnitudes as well: y = m / ||W + dW|| * x (W + dW), the norm taken as constant.
    """

    sites: tuple[tuple[str, Site], ...]
    rank: int = 16
    alpha: float = 32.0
    dora: bool = False

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        """Return random A and zero B for every site, and the columns' norms as magnitudes."""
        keys = jax.random.split(key, len(self.sites))
        bounds = {name: site.d_in**-0.5 for name, site in self.sites}
        A = {
            name: jax.random.uniform(k, (site.layers, site.d_in, self.rank), jnp.float32, -bounds[name], bounds[name])
            for (name, site), k in zip(self.sites, keys, strict=True)
        }
        B = {name: jnp.zeros((site.layers, self.rank, site.d_out)) for name, site in self.sites}
        params: Params = {"lora": {"A": A, "B": B}}
        if self.dora:
            assert frozen.norms is not None
            params["magnitudes"] = {name: frozen.norms[name] for name, _ in self.sites}
        return params

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the adapters, the scaling folded into B; no metrics."""
        A, B = params["lora"]["A"], params["lora"]["B"]
        B = {site: b * (self.alpha / self.rank) for site, b in B.items()}
        if self.dora:
            return {site: WeightDecomposed(A[site], B[site], params["magnitudes"][site]) for site in A}, {}
        return {site: LowRank(A[site], B[site]) for site in A}, {}

    def trainable(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        """Return that every number counts."""
        return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
