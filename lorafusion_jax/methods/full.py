"""Full fine-tuning: every weight of the base model is trained."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ..training.frozen import Frozen
from ..training.method import Adapted, Index, Method, Params
from ..training.recipe import Recipe
from .entry import CostLayout, MethodEntry


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullRecipe(Recipe):
    """Recipe of full fine-tuning.

    Attributes:
      lr_full: learning rate of all weights.
    """

    lr_full: float = 2e-4


@dataclasses.dataclass(frozen=True)
class FullFineTuning(Method):
    """All weights, in float32.

    Group `base`: path in the model's state -> weight (see `Problem.adapted_model`).
    """

    def learning_rates(self, recipe: Any) -> dict[str, float]:
        return {"base": recipe.lr_full}

    def init(self, frozen: Frozen, index: Index, key: PRNGKeyArray) -> Params:
        by_path, _ = jax.tree.flatten_with_path(frozen.base)
        return {
            "base": {
                jax.tree_util.keystr(path): weight.astype(jnp.float32)
                for path, weight in by_path
            }
        }

    def adapters(self, params: Params, frozen: Frozen, index: Index) -> Adapted:
        return {}, {}


ENTRIES = (
    MethodEntry(
        name="full",
        help="train every weight of the base model",
        title="full fine-tuning",
        build=lambda built: FullFineTuning(),
        recipe=FullRecipe,
        groups=("base",),
        cost_layouts=lambda recipe, rank: {
            "full fine-tuning": CostLayout(written="once")
        },
    ),
)
