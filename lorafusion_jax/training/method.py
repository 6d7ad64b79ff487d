"""The protocol of a method, and the frozen weights that it gets; training calls what `methods` implements.

Axis letters: N modules of a fusion.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from ..adapters.basis import Pool
from ..adapters.norms import Gram, PairTerms
from ..adapters.updates import Composition
from ..models.weights import Weight, per_layer, reads
from .mesh import WHOLE
from .recipe import Recipe

# Purposes of reads of arrays other than training: the first of the numbers that determine the noise.
VALIDATION, SEARCH, GENERATION, LOSS, OPTIONS = range(5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """Weights that no step changes.

    A subclass may give each seed or each step other weights: `hardware.chips` does. `split` is how a mesh splits all
    leaves, where devices compute seeds.

    Attributes:
      base: the base model's weights.
      pool: modules, whole or in a shared basis, for methods that fuse.
      gram: the pool's Gram terms on the base, or its pair terms.
      norms: site -> [L, d_out], ||W|| of every column of the sites that a method without a pool rescales.
      precomputed: other pytree that the method computes once (`Method.precompute`), such as random matrices.
      preparations: preparations of the base's matrices by their names, for arrays (`crossbar.prepare`).
    """

    split: ClassVar[PartitionSpec] = WHOLE

    base: nnx.State
    pool: Pool | None = None
    gram: Gram | PairTerms | None = None
    norms: dict[str, Float[Array, "*C _L _d_out"]] | None = None
    precomputed: Any = None
    preparations: Any = None

    def per_layer(self) -> "Frozen":
        """Return the weights with the base model's layers in separate arrays (`weights.per_layer`)."""
        return dataclasses.replace(self, base=per_layer(self.base))

    def of_seed(self, number: Int[Array, ""]) -> "Frozen":
        """Return the weights of one seed of a program, by its position, with separate read noise."""
        return reads(self, number)

    def of_step(self, step: Int[Array, ""], graph: nnx.GraphDef) -> "Frozen":
        """Return the weights of one training step, with separate read noise."""
        return reads(self, step)


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
