"""Counts of a model's numbers and of those that each method trains, from shapes alone; shapes of common models."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from ..adapters.basis import Pool, SharedBasis, check_width
from ..adapters.pool import LoraPool
from ..io.hf import read_config
from ..methods import METHODS
from ..methods.entry import WITH_CORE, Built, MethodEntry, PlannedPool
from ..methods.recipes import basis_of, modules_of, recipe_of
from ..models.architecture import Architecture, targeted
from ..models.registry import abstract_model, known_shapes
from ..support.checks import at_least
from ..training.frozen import Frozen
from ..training.recipe import Recipe


def counts(
    config: Architecture,
    *,
    modules: int = 20,
    rank: int = 16,
    vera_rank: int = 128,
    basis: int | None = 32,
    targets: Sequence[str] | None = None,
) -> dict[str, int]:
    """Return how many numbers each method trains, without the methods in a basis if that is None.

    Raises:
      ValueError: a count below one, a target that the model does not have, or more directions than a matrix has.
    """
    at_least(1, modules=modules, rank=rank, vera_rank=vera_rank, basis=basis)
    maps = None if targets is None else tuple(targets)
    numbers = {
        "modules": modules,
        "lora_rank": rank,
        "vera_rank": vera_rank,
        "lora_targets": maps,
    }
    fused = PlannedPool(rank=rank, pool=modules, targets=maps)
    counted = {}
    for entry in METHODS.values():
        recipe = recipe_of(entry.recipe, numbers)
        asked = (
            {} if entry.title is None else {entry.title.format(**vars(recipe)): recipe}
        )
        if entry.basis_title is not None and basis is not None:
            for core in (False, True):
                in_basis = recipe_of(
                    entry.recipe, vars(recipe) | {"basis": basis, "train_core": core}
                )
                asked[
                    entry.basis_title.format(basis=basis) + (WITH_CORE if core else "")
                ] = in_basis
        counted |= {
            title: sum(trainable_count(entry, config, of, fused).values())
            for title, of in asked.items()
        }
    return counted


def shape_config(shape: str) -> Architecture:
    """Return the structure of a known shape, or of a base model as `read_config` does; ValueError if it is neither."""
    if shape in known_shapes():
        return known_shapes()[shape]
    if "/" not in shape and not Path(shape).exists():
        raise ValueError(
            f"no shape {shape!r}: give a folder, hub id, GGUF file or one of {', '.join(known_shapes())}"
        )
    config = read_config(shape)
    return dataclasses.replace(config, tied=config.presumed_tied)


@functools.lru_cache
def trainable_count(
    entry: MethodEntry, config: Architecture, recipe: Recipe, modules: PlannedPool
) -> dict[str, int]:
    """Return how many numbers of one seed a method trains or searches, by group.

    The method itself makes its numbers, for a model and a pool that are shapes. The recipe is of the entry's class.
    """
    if (k := basis_of(recipe)) is not None:
        for name, site in targeted(config, modules.targets).items():
            check_width(k, name, site.d_in, site.d_out)
    if not entry.groups:
        return {}

    count = modules_of(recipe)

    def start(base: nnx.State) -> dict:
        pool = _pool(config, modules, count, k) if entry.pool else None
        method = entry.build(
            Built(config=config, recipe=recipe, pool=pool, modules=count)
        )
        kernels = {
            name: jnp.zeros((site.layers, site.d_in, site.d_out))
            for name, site in config.sites.items()
        }
        frozen = method.precompute(Frozen(base, pool), kernels)
        return method.init(frozen, jnp.arange(count), jax.random.key(0))

    params = jax.eval_shape(start, _base(config))
    return {
        group: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for group, tree in params.items()
    }


def size(config: Architecture) -> int:
    """Return how many numbers the model has."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_base(config)))


@functools.cache
def _base(config: Architecture) -> nnx.State:
    """Return the shapes of the model's weights."""
    return nnx.state(abstract_model(config))


def _pool(
    config: Architecture, modules: PlannedPool, count: int, k: int | None
) -> Pool:
    adapted = targeted(config, modules.targets)
    r = modules.rank
    names = tuple(map(str, range(count)))
    shapes = {
        name: (site.layers, site.d_in, site.d_out) for name, site in adapted.items()
    }
    rank = {
        name: jnp.full((layers, count), r, jnp.int32)
        for name, (layers, _, _) in shapes.items()
    }
    if k is None:
        return LoraPool(
            A={
                name: jnp.zeros((layers, count, d_in, r))
                for name, (layers, d_in, _) in shapes.items()
            },
            B={
                name: jnp.zeros((layers, count, r, d_out))
                for name, (layers, _, d_out) in shapes.items()
            },
            rank=rank,
            names=names,
        )
    return SharedBasis(
        U={
            name: jnp.zeros((layers, d_in, k))
            for name, (layers, d_in, _) in shapes.items()
        },
        V={
            name: jnp.zeros((layers, k, d_out))
            for name, (layers, _, d_out) in shapes.items()
        },
        S={
            name: jnp.zeros((layers, count, k, k))
            for name, (layers, _, _) in shapes.items()
        },
        energy={
            name: jnp.zeros((layers, count)) for name, (layers, _, _) in shapes.items()
        },
        rank=rank,
        names=names,
        sites=tuple(adapted),
    )
