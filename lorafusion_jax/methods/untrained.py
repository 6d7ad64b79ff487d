"""Baselines that train nothing: the unchanged base model, the same with examples in its prompt, a constant answer."""

import dataclasses

from jaxtyping import PRNGKeyArray

from ..training.frozen import Frozen
from ..training.method import Adapted, Index, Method, Params
from ..training.recipe import Recipe
from .entry import MethodEntry


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


_ZERO_SHOT = MethodEntry(
    name="zero-shot",
    help="use the base model unchanged",
    build=lambda built: ZeroShot(),
    learns="untrained",
    seeded=False,
)
ENTRIES = (
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
