"""The protocol of a method, below `methods`, because training calls it and methods implement it.

Axis letters: N modules of a fusion.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..adapters.updates import Composition
from ..models.weights import Weight
from .frozen import Frozen
from .recipe import Recipe

Params = dict[str, Any]


@runtime_checkable
class Method(Protocol):
    """The map from trainable numbers to adapters.

    A method is a frozen dataclass: hashable, a static part of a problem. Its numbers are a dictionary of groups, each
    with a learning rate of its own. `index` [N] selects the modules of the pool that a seed fuses; a method without a
    pool ignores it. A class that inherits from this one has all but `init` and `adapters` already.
    """

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        """Return the numbers that training starts from, by group."""
        ...

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the adapters for the model, by site, and metrics about them."""
        ...

    def trainable(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        """Return, in the shape of `params`, which numbers act on anything: the others are not counted.

        By default all do.
        """
        return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)

    def as_fusion(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Float[Array, "_L N _k"]], Composition] | None:
        """Return coefficients by site and the composition of the fusion of whole modules that the numbers are.

        An export then writes the modules' own matrices. By default None: it writes the adapters.
        """
        return None

    def learning_rates(self, recipe: Recipe) -> dict[str, float]:
        """Return the learning rate of every group. By default the result is empty, and nothing is trained."""
        return {}

    def prepare(self, frozen: Frozen, kernels: Mapping[str, Weight]) -> Frozen:
        """Return the frozen weights with what the method computes once from them. By default nothing is added.

        Args:
          frozen: base and pool.
          kernels: of the base model, by site.
        """
        return frozen
