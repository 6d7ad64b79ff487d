"""A problem: the method to train, the frozen weights and the modules, in one argument of all computations.

The protocol of a method is here, below `methods`, because training calls it and methods implement it.

Axis letters: N modules of a fusion.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..adapters.basis import Pool
from ..adapters.norms import Gram, PairTerms
from ..adapters.updates import Composition
from ..models.architecture import Architecture, Model
from ..models.weights import Weight, reads, unstacked
from .recipe import Recipe
from .seeds import Path, over_seeds

Params = dict[str, Any]

# Purposes of reads of arrays other than training: the first of the numbers that determine the noise.
VALIDATION, SEARCH, GENERATION, LOSS, OPTIONS = range(5)


class Projections(NamedTuple):
    """Random matrices; a site uses the first rows of A and the first columns of B."""

    A: Float[Array, "*C widest_in r"]
    B: Float[Array, "*C r widest_out"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """Weights that no step changes.

    A subclass may give each seed or each step other weights: `hardware.chips` does.

    Attributes:
      base: the base model's weights.
      pool: of modules, for methods that fuse: whole, or in a shared basis.
      gram: the pool's Gram terms on the base, or its pair terms.
      norms: site -> [L, d_out], ||W|| of every column of the sites that a method without a pool rescales.
      projections: VeRA's random matrices, which all sites share.
    """

    base: nnx.State
    pool: Pool | None = None
    gram: Gram | PairTerms | None = None
    norms: dict[str, Float[Array, "*C _L _d_out"]] | None = None
    projections: Projections | None = None

    def unstacked(self) -> "Frozen":
        """Return the weights with those of the base model as generation reads them fastest: `weights.unstacked`."""
        return dataclasses.replace(self, base=unstacked(self.base))

    def of_seed(self, number: Int[Array, ""]) -> "Frozen":
        """Return the weights of one seed of a program, by its position: read with noise of its own."""
        return reads(self, number)

    def of_step(self, step: Int[Array, ""], graph: nnx.GraphDef) -> "Frozen":
        """Return the weights of one training step: read with noise of its own."""
        return reads(self, step)


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that a loss depends on, other than the trained numbers and a batch.

    A pytree: `frozen` and `index` are arrays, the rest is structure. Another structure is another program.

    Attributes:
      graph: the model's structure, of `nnx.split(model)`.
      method: what is trained.
      frozen: what is not.
      index: [N], the modules of the pool that are fused; for several seeds [seeds, N].
      path: how several seeds run.
    """

    graph: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    method: Method = dataclasses.field(metadata={"static": True})
    frozen: Frozen
    index: Int[Array, "*seeds N"]
    path: Path = dataclasses.field(default="vmap", metadata={"static": True})

    @property
    def config(self) -> Architecture:
        """The structure of the model."""
        return nnx.merge(self.graph, self.frozen.base).config

    def replace(self, **changes: Any) -> "Problem":
        """Return the problem with other fields."""
        return dataclasses.replace(self, **changes)

    def read(self, purpose: int, number: int) -> "Problem":
        """Return the problem whose arrays, if there are any, are read with the noise of this purpose and number."""
        return self.replace(frozen=reads(self.frozen, purpose, number))

    def init(self, key: Array) -> Params:
        """Return the numbers that training of one seed starts from."""
        return self.method.init(self.frozen, self.index, key)

    def trainable(self, params: Params) -> Params:
        """Return which numbers of one seed act on anything."""
        return self.method.trainable(params, self.frozen, self.index)

    def over_seeds(self, fn: Callable[..., Any], of_seeds: tuple[Any, ...], shared: Any = ()) -> Any:
        """Return `fn(problem of one seed, *its own arrays, *shared)` of every seed.

        Args:
          fn: of one seed.
          of_seeds: trees whose leaves have a leading axis of seeds.
          shared: trees that all seeds share.
        """

        def one_seed(seed: tuple[Any, ...], everything: tuple[Frozen, Any]) -> Any:
            (number, index, *own), (frozen, shared) = seed, everything
            return fn(self.replace(frozen=frozen.of_seed(number), index=index), *own, *shared)

        seeds = (jnp.arange(self.index.shape[0]), self.index, *of_seeds)
        return over_seeds(one_seed, self.path)(seeds, (self.frozen, shared))

    def adapted_model(self, params: Params) -> tuple[Model, dict[str, Any], dict[str, Array]]:
        """Return the model of one seed, the adapters to call it with, and metrics about them.

        Weights in the group `base`, by path, take the place of the frozen ones.
        """
        adapters, metrics = self.method.adapters(params, self.frozen, self.index)
        weights = self.frozen.base
        if "base" in params:
            by_path, tree = jax.tree.flatten_with_path(weights)
            weights = tree.unflatten([params["base"][jax.tree_util.keystr(path)] for path, _ in by_path])
        return nnx.merge(self.graph, weights), adapters, metrics


def per_seed(of_batch: Callable[[Params, Any, Problem], Any]) -> Callable[[Params, Any, Problem], Any]:
    """Return `of_batch(params, batch, problem)` of one seed as one jitted program for all seeds.

    Params, batch and the problem's index have a leading axis of seeds: each seed has a batch of its own, and reads
    arrays with noise of its own.
    """

    def of_seeds(params: Params, batch: Any, problem: Problem) -> Any:
        return problem.over_seeds(lambda one, params, batch: of_batch(params, batch, one), (params, batch))

    of_seeds.__name__, of_seeds.__doc__ = of_batch.__name__, of_batch.__doc__
    return jax.jit(of_seeds)
