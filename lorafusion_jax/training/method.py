"""The protocol of a method, below `methods`, because training calls it and methods implement it.

Axis letters: N modules of a fusion.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from ..adapters.updates import Composition
from ..models.weights import Weight
from .frozen import Frozen
from .recipe import Recipe

Params = dict[str, Any]
# Modules of the pool that a seed fuses; a method without a pool ignores them.
Index = Int[Array, " N"]
Metrics = dict[str, Num[Array, ""]]
# Adapters by site, and metrics about them.
Adapted = tuple[dict[str, Any], Metrics]
# Coefficients of whole modules by site, and their composition.
Fused = tuple[dict[str, Float[Array, "_L N _k"]], Composition]


@runtime_checkable
class Method(Protocol):
    """The map from trainable parameters to adapters.

    A method is a frozen dataclass: hashable, a static part of a problem. Its parameters are a dictionary of groups,
    each with its learning rate. A class that inherits from this one only has to add `init` and `adapters`.
    """

    def init(self, frozen: Frozen, index: Index, key: PRNGKeyArray) -> Params:
        """Return the parameters that training starts from, by group."""
        ...

    def adapters(self, params: Params, frozen: Frozen, index: Index) -> Adapted:
        """Return the adapters for the model, by site, and metrics about them."""
        ...

    def trainable(self, params: Params, frozen: Frozen, index: Index) -> Params:
        """Return, in the shape of `params`, which parameters act on anything and are counted. By default all do."""
        return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)

    def penalty(self, params: Params, frozen: Frozen, index: Index) -> Float[Array, ""]:
        """Return the term that the objective adds to the loss. By default it is zero."""
        return jnp.float32(0)

    def as_fusion(self, params: Params, frozen: Frozen, index: Index) -> Fused | None:
        """Return coefficients by site and composition, if the parameters are a fusion of whole modules.

        An export then writes the modules' own matrices. By default None: it writes the adapters.
        """
        return None

    def learning_rates(self, recipe: Recipe) -> dict[str, float]:
        """Return the learning rate of every group: by default the recipe's `lr_GROUP`. Others are not trained."""
        fields = [
            field.name
            for field in dataclasses.fields(recipe)
            if field.name.startswith("lr_")
        ]
        return {name.removeprefix("lr_"): getattr(recipe, name) for name in fields}

    def precompute(self, frozen: Frozen, kernels: Mapping[str, Weight]) -> Frozen:
        """Return the frozen weights with terms that are computed once from base, pool and kernels (by site)."""
        return frozen
