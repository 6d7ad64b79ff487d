"""Counts of a model's numbers and of the numbers that a method trains, from shapes alone."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from ..adapters.basis import Pool, SharedBasis, check_width
from ..adapters.pool import LoraPool
from ..methods.entry import Built, MethodEntry, PlannedPool
from ..methods.recipes import basis_of, modules_of
from ..models.architecture import Architecture, targeted
from ..models.registry import abstract_model
from ..training.frozen import Frozen
from ..training.recipe import Recipe


@functools.lru_cache
def trainable_count(entry: MethodEntry, config: Architecture, recipe: Recipe, modules: PlannedPool) -> dict[str, int]:
    """Return how many numbers of one seed a method trains or searches, by group.

    The method itself is asked: its numbers are made for a model and a pool that are shapes.

    Args:
      entry: of the method.
      config: of the base model.
      recipe: of the run, of the class that the entry names.
      modules: rank and targets of the modules that are fused.

    Raises:
      ValueError: a target that the model does not have, or a basis of more directions than a matrix has.
    """
    if (k := basis_of(recipe)) is not None:
        for name, site in targeted(config, modules.targets).items():
            check_width(k, name, site.d_in, site.d_out)
    if not entry.groups:
        return {}

    count = modules_of(recipe)

    def start(base: nnx.State) -> dict:
        pool = _pool(config, modules, count, k) if entry.pool else None
        method = entry.build(Built(config=config, recipe=recipe, pool=pool, modules=count))
        kernels = {name: jnp.zeros((site.layers, site.d_in, site.d_out)) for name, site in config.sites.items()}
        frozen = method.prepare(Frozen(base, pool), kernels)
        return method.init(frozen, jnp.arange(count), jax.random.key(0))

    params = jax.eval_shape(start, _base(config))
    return {group: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for group, tree in params.items()}


def size(config: Architecture) -> int:
    """Return how many numbers the model has."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_base(config)))


@functools.cache
def _base(config: Architecture) -> nnx.State:
    """Return the shapes of the model's weights."""
    return nnx.state(abstract_model(config))


def _pool(config: Architecture, modules: PlannedPool, count: int, k: int | None) -> Pool:
    adapted, rank = targeted(config, modules.targets), modules.rank
    names = tuple(map(str, range(count)))
    ranks = {name: jnp.full((site.layers, count), rank, jnp.int32) for name, site in adapted.items()}
    if k is None:
        return LoraPool(
            A={name: jnp.zeros((site.layers, count, site.d_in, rank)) for name, site in adapted.items()},
            B={name: jnp.zeros((site.layers, count, rank, site.d_out)) for name, site in adapted.items()},
            rank=ranks,
            names=names,
        )
    return SharedBasis(
        U={name: jnp.zeros((site.layers, site.d_in, k)) for name, site in adapted.items()},
        V={name: jnp.zeros((site.layers, k, site.d_out)) for name, site in adapted.items()},
        S={name: jnp.zeros((site.layers, count, k, k)) for name, site in adapted.items()},
        energy={name: jnp.zeros((site.layers, count)) for name, site in adapted.items()},
        rank=ranks,
        names=names,
        sites=tuple(adapted),
    )
