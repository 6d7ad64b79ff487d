"""A problem: the method to train, the frozen weights and the modules, in one argument of all computations.

Axis letters: N modules of a fusion.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from ..adapters.basis import Pool
from ..adapters.pool import in_pool
from ..models.architecture import Architecture, Model, kernels
from ..models.weights import reads
from ..support.platform import check_mesh, quick_jit
from .mesh import WHOLE, SeedMode, over_seeds
from .method import Frozen, Method, Metrics, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that a loss depends on, other than the trained parameters and a batch.

    A pytree: `frozen` and `index` are arrays, the other fields are structure, for which a program is compiled.

    Attributes:
      graph: structure of the model, from `nnx.split(model)`.
      method: trained method.
      frozen: weights that are not trained.
      index: [N], modules of the pool that are fused; for several seeds [seeds, N]. Those outside of the pool raise a
        ValueError; inside a compiled function, where they have no values, they make a fusion NaN.
      seed_mode: mode of several seeds.
    """

    graph: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    method: Method = dataclasses.field(metadata={"static": True})
    frozen: Frozen
    index: Int[Array, "*seeds N"]
    seed_mode: SeedMode = dataclasses.field(
        default="batched", metadata={"static": True}
    )

    def __post_init__(self) -> None:
        check_mesh((self.frozen, self.index))
        # Transformations also fill the fields with other objects than arrays.
        if (
            isinstance(self.index, np.ndarray | jax.Array)
            and self.frozen.pool is not None
        ):
            in_pool(len(self.frozen.pool), self.index)

    @property
    def config(self) -> Architecture:
        """Structure of the model."""
        return nnx.merge(self.graph, self.frozen.base).config

    def replace(self, **changes: Any) -> "Problem":
        """Return the problem with other fields."""
        return dataclasses.replace(self, **changes)

    def per_layer(self) -> "Problem":
        """Return the problem with frozen layers in separate arrays, which are not copied out of their stacks."""
        return self.replace(frozen=self.frozen.per_layer())

    def read(self, purpose: int, number: int) -> "Problem":
        """Return the problem whose crossbar arrays are read with the noise of this purpose and number."""
        return self.replace(frozen=reads(self.frozen, purpose, number))

    def init(self, key: PRNGKeyArray) -> Params:
        """Return the parameters that training of one seed starts from."""
        return self.method.init(self.frozen, self.index, key)

    def trainable(self, params: Params) -> Params:
        """Return which parameters of one seed act on anything."""
        return self.method.trainable(params, self.frozen, self.index)

    def over_seeds(
        self,
        fn: Callable[..., Any],
        of_seeds: tuple[Any, ...],
        shared: Any = (),
        seed_indices: Int[Array, " seeds"] | None = None,
    ) -> Any:
        """Return `fn(problem of one seed, *arrays of the seed, *shared)` for every seed.

        The leaves of `of_seeds` have a leading axis of seeds. `seed_indices` are the seeds' positions if there are
        others.
        """

        def one_seed(seed: tuple[Any, ...], everything: tuple[Frozen, Any]) -> Any:
            number, index, *seed_values = seed
            frozen, shared = everything
            return fn(
                self.replace(frozen=frozen.of_seed(number), index=index),
                *seed_values,
                *shared,
            )

        seed_indices = (
            jnp.arange(self.index.shape[0]) if seed_indices is None else seed_indices
        )
        seeds = (seed_indices, self.index, *of_seeds)
        return over_seeds(one_seed, self.seed_mode, (self.frozen.split, WHOLE))(
            seeds, (self.frozen, shared)
        )

    def adapted_model(self, params: Params) -> tuple[Model, dict[str, Any], Metrics]:
        """Return the model of one seed, the adapters to call it with, and metrics about them.

        Weights in the group `base`, by path, replace the frozen ones.
        """
        adapters, metrics = self.method.adapters(params, self.frozen, self.index)
        weights = self.frozen.base
        if "base" in params:
            by_path, tree = jax.tree.flatten_with_path(weights)
            weights = tree.unflatten(
                [params["base"][jax.tree_util.keystr(path)] for path, _ in by_path]
            )
        return nnx.merge(self.graph, weights), adapters, metrics


def per_seed(
    function: Callable[[Params, Any, Problem], Any],
) -> Callable[[Params, Any, Problem], Any]:
    """Return `of_batch(params, batch, problem)` of one seed as one jitted program for all seeds.

    Params, batch and the problem's index have a leading axis of seeds. Each seed has separate read noise.
    """

    def of_seeds(params: Params, batch: Any, problem: Problem) -> Any:
        return problem.over_seeds(
            lambda problem_of_seed, params, batch: function(
                params, batch, problem_of_seed
            ),
            (params, batch),
        )

    of_seeds.__name__ = function.__name__
    of_seeds.__doc__ = function.__doc__
    return quick_jit(of_seeds)


def problem(model: Model, pool: Pool | None, method: Method) -> Problem:
    """Return the problem of training a method on a model, with all modules of a pool.

    Args:
      model: base model, which may be in arrays.
      pool: LoRA pool or shared basis; None for a method without one.
      method: trained method.
    """
    graph, base = nnx.split(model)
    frozen = method.precompute(
        Frozen(base, pool), kernels(model, pool.sites if pool else ())
    )
    index = jnp.arange(0 if pool is None else len(pool))
    return Problem(graph=graph, method=method, frozen=frozen, index=index)
