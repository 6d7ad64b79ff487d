"""Baselines that train nothing: the unchanged base model, the same with examples in its prompt, a constant answer."""

import dataclasses
from typing import Any

from jaxtyping import Array, Int

from ..checks import at_least
from ..training.frozen import Frozen
from ..training.method import Method, Params
from ..training.recipe import Recipe
from .method import MethodEntry, Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotRecipe(Recipe):
    """Recipe of a few-shot prompt.

    Attributes:
      shots: number of examples in the prompt.
    """

    shots: int = 5

    def check(self) -> None:
        """Raise ValueError for numbers that no prompt can have."""
        super().check()
        at_least(1, shots=self.shots)


@dataclasses.dataclass(frozen=True)
class ZeroShot(Method):
    """The unchanged base model: nothing is trained."""

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        """Return no numbers."""
        return {}

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return no adapters."""
        return {}, {}


_ZERO_SHOT = MethodEntry(
    name="zero-shot",
    help="ask the base model as it is",
    build=lambda built: ZeroShot(),
    update=lambda recipe, modules: Update(),
    learns="untrained",
    seeded=False,
)
ENTRIES = (
    _ZERO_SHOT,
    dataclasses.replace(
        _ZERO_SHOT,
        name="few-shot",
        help="ask the base model with examples in the prompt",
        recipe=FewShotRecipe,
        answers="examples",
        seeded=True,
    ),
    dataclasses.replace(
        _ZERO_SHOT, name="constant", help="give the most common answer", answers="nothing", seeded=True
    ),
)
