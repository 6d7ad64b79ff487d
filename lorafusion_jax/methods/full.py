"""Full fine-tuning: every weight of the base model is trained."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .method import Frozen, Params


@dataclasses.dataclass(frozen=True)
class FullFineTuning:
    """All weights, in float32.

    Group `base`: path in the model's state -> weight (see `methods.adapted_model`).
    """

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        """Return the pretrained weights."""
        by_path, _ = jax.tree.flatten_with_path(frozen.base)
        return {"base": {jax.tree_util.keystr(path): weight.astype(jnp.float32) for path, weight in by_path}}

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return no adapters."""
        return {}, {}

    def trainable(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        """Return that every number counts."""
        return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
