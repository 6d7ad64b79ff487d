"""Methods of the base model alone: its magnitudes or all of its weights are trained, or nothing is.

Nothing is trained for the unchanged base, for the same with examples in its prompt, and for a constant answer.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ..adapters.norms import norms
from ..adapters.updates import Rescaled
from ..models.weights import Weight
from ..training.method import Adapted, Frozen, Index, Method, Params
from ..training.recipe import Recipe
from .entry import CostLayout, MethodEntry, RescalingRecipe, TargetedRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagnitudesRecipe(RescalingRecipe, TargetedRecipe):
    """Recipe of magnitudes alone."""


@dataclasses.dataclass(frozen=True)
class Magnitudes(Method):
    """LoRAFusion's magnitudes without its coefficients: y = m / ||W|| * x W.

    Group `magnitudes`: site -> [L, d_out], from ||W||.

    Attributes:
      sites: names of the linear maps; None for all.
    """

    sites: tuple[str, ...] | None = None

    def precompute(self, frozen: Frozen, kernels: Mapping[str, Weight]) -> Frozen:
        return with_norms(frozen, kernels, self.sites)

    def init(self, frozen: Frozen, index: Index, key: PRNGKeyArray) -> Params:
        assert frozen.norms is not None
        return {"magnitudes": frozen.norms}

    def adapters(self, params: Params, frozen: Frozen, index: Index) -> Adapted:
        assert frozen.norms is not None
        return {
            site: Rescaled(m / frozen.norms[site])
            for site, m in params["magnitudes"].items()
        }, {}


def with_norms(
    frozen: Frozen, kernels: Mapping[str, Weight], sites: Iterable[str] | None
) -> Frozen:
    """Return the frozen weights with ||W|| of every column of some sites; None for all sites."""
    adapted = {name: kernels[name] for name in (kernels if sites is None else sites)}
    return dataclasses.replace(frozen, norms=jax.jit(norms)(adapted))


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotRecipe(Recipe):
    """Recipe of a few-shot prompt.

    Attributes:
      shots: number of examples in the prompt.
    """

    shots: int = 5


@dataclasses.dataclass(frozen=True)
class ZeroShot(Method):
    """The unchanged base model: nothing is trained."""

    def init(self, frozen: Frozen, index: Index, key: PRNGKeyArray) -> Params:
        return {}

    def adapters(self, params: Params, frozen: Frozen, index: Index) -> Adapted:
        return {}, {}


MAGNITUDES = MethodEntry(
    name="magnitudes",
    help="train the magnitudes of the base's own matrices, alone",
    title="LoRAFusion, magnitudes only",
    build=lambda built: Magnitudes(tuple(name for name, _ in built.sites)),
    recipe=MagnitudesRecipe,
    groups=("magnitudes",),
)
FULL = MethodEntry(
    name="full",
    help="train every weight of the base model",
    title="full fine-tuning",
    build=lambda built: FullFineTuning(),
    recipe=FullRecipe,
    groups=("base",),
    cost_layouts=lambda recipe, rank: {"full fine-tuning": CostLayout(written="once")},
)
_ZERO_SHOT = MethodEntry(
    name="zero-shot",
    help="use the base model unchanged",
    build=lambda built: ZeroShot(),
    learns="untrained",
    seeded=False,
)
UNTRAINED = (
    _ZERO_SHOT,
    dataclasses.replace(
        _ZERO_SHOT,
        name="few-shot",
        help="use the base model with examples in the prompt",
        recipe=FewShotRecipe,
        answers="examples",
        seeded=True,
    ),
    dataclasses.replace(
        _ZERO_SHOT,
        name="constant",
        help="give the most common answer",
        answers="nothing",
        seeded=True,
    ),
)
