"""Counts of a model's numbers and of those that each method trains, from shapes alone; shapes of common models."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from ..adapters.basis import Pool, SharedBasis, check_width
from ..adapters.pool import LoraPool
from ..io.hf import Base, open_base
from ..methods import METHODS
from ..methods.entry import (
    Built,
    MethodEntry,
    PlannedPool,
    basis_of,
    modules_of,
    recipe_of,
)
from ..models.architecture import (
    Architecture,
    Site,
    kernels,
    matrices,
    set_matrices,
    targeted,
)
from ..models.registry import abstract_model, known_shapes
from ..models.weights import PerLayerWeights, dense, quantise
from ..support.checks import at_least
from ..support.options import LoadIn
from ..training.method import Frozen
from ..training.problem import Problem
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
    totals = {}
    for entry in METHODS.values():
        titles: dict[int | None, str | None] = {None: entry.title}
        if basis is not None:
            titles[basis] = entry.basis_title
        for k, title in titles.items():
            if title is None:
                continue
            recipe = recipe_of(entry.recipe, numbers | {"basis": k})
            groups = trainable_count(entry, config, recipe, fused)
            totals[title.format(**vars(recipe))] = sum(groups.values())
    return totals


def shape_config(shape: str | Base) -> Architecture:
    """Return the structure of a known shape, or of a base model as `read_config` does; ValueError if it is neither."""
    if isinstance(shape, str) and shape in known_shapes():
        return known_shapes()[shape]
    if isinstance(shape, str) and "/" not in shape and not Path(shape).exists():
        raise ValueError(
            f"no shape {shape!r}: give a folder, hub id, GGUF file or one of {', '.join(known_shapes())}"
        )
    config = open_base(shape).config
    return dataclasses.replace(config, tied=config.presumed_tied)


@functools.lru_cache
def trainable_count(
    entry: MethodEntry, config: Architecture, recipe: Recipe, modules: PlannedPool
) -> dict[str, int]:
    """Return how many numbers of one seed a method trains or searches, by group.

    The method itself makes its numbers, for a model and a pool that are shapes. The recipe is of the entry's class.
    """
    if not entry.groups:
        return {}
    shapes = abstract_problem(entry, config, recipe, modules)
    params = jax.eval_shape(
        lambda leaves: shapes.problem(leaves).init(jax.random.key(0)), shapes.leaves
    )
    return {
        group: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for group, tree in params.items()
    }


class AbstractProblem(NamedTuple):
    """A problem whose arrays are shapes: its leaves, and the structure to rebuild it where functions are traced."""

    leaves: list[jax.ShapeDtypeStruct]
    tree: Any

    def problem(self, leaves: Sequence[Any]) -> Problem:
        """Return the problem with traced leaves."""
        return self.tree.unflatten(leaves)


def abstract_problem(
    entry: MethodEntry,
    config: Architecture,
    recipe: Recipe,
    modules: PlannedPool,
    load_in: LoadIn = "full",
    *,
    seeds: int = 1,
    apart: bool = False,
) -> AbstractProblem:
    """Return the problem of some seeds with a base and a pool that are shapes; the recipe is of the entry's class.

    One seed has no axis of seeds. With `apart`, layers are in separate arrays, as loops on a CPU read them
    (`Frozen.per_layer`).

    Raises:
      ValueError: more directions of a basis than a matrix has, or targets that the model lacks.
    """
    k = basis_of(recipe)
    if k is not None:
        for name, site in targeted(config, modules.targets).items():
            check_width(k, name, site.d_in, site.d_out)
    count = modules_of(recipe)
    graph, base = nnx.split(abstract_model(config))
    trees: list[Any] = []

    def build(base: nnx.State) -> list[jax.Array]:
        base = jax.tree.map(lambda leaf: leaf.astype(config.dtype), base)
        pool = None
        if entry.pool:
            pool = _pool(config, modules, max(modules.pool, count), k)
        if load_in != "full":
            model = nnx.merge(graph, base)
            quantised = {
                name: quantise(dense(weight, jnp.float32), load_in, tiled_axis=-2)
                for name, weight in matrices(model).items()
            }
            set_matrices(model, quantised)
            base = nnx.split(model)[1]
            pool = None if pool is None else pool.quantised(load_in)
        model = nnx.merge(graph, base)
        method = entry.build(
            Built(config=config, recipe=recipe, pool=pool, modules=count)
        )
        frozen = method.precompute(Frozen(base, pool), kernels(model))
        if apart:
            separate = jax.tree.map(
                _separate, base, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray)
            )
            frozen = dataclasses.replace(frozen, base=separate)
        index = jnp.zeros(count if seeds == 1 else (seeds, count), jnp.int32)
        problem = Problem(graph=graph, method=method, frozen=frozen, index=index)
        leaves, tree = jax.tree.flatten(problem)
        trees.append(tree)
        return leaves

    leaves = jax.eval_shape(build, base)
    return AbstractProblem(leaves, trees[0])


def _separate(leaf: Any) -> Any:
    """Return a stack of plain matrices in separate arrays."""
    if isinstance(leaf, qwix.QArray) or leaf.ndim != 3:
        return leaf
    return PerLayerWeights(tuple(leaf[layer] for layer in range(len(leaf))))


def size(config: Architecture) -> int:
    """Return how many numbers the model has."""
    weights = jax.tree.leaves(nnx.state(abstract_model(config)))
    return sum(math.prod(leaf.shape) for leaf in weights)


def _pool(
    config: Architecture, modules: PlannedPool, count: int, k: int | None
) -> Pool:
    adapted = targeted(config, modules.targets)
    r = modules.rank
    names = tuple(map(str, range(count)))

    def zeros(shape: Callable[[Site], tuple[int, ...]]) -> dict[str, Any]:
        return {
            name: jnp.zeros((site.layers, *shape(site)))
            for name, site in adapted.items()
        }

    rank = {
        name: jnp.full((site.layers, count), r, jnp.int32)
        for name, site in adapted.items()
    }
    if k is None:
        return LoraPool(
            A=zeros(lambda site: (count, site.d_in, r)),
            B=zeros(lambda site: (count, r, site.d_out)),
            rank=rank,
            names=names,
        )
    return SharedBasis(
        U=zeros(lambda site: (site.d_in, k)),
        V=zeros(lambda site: (k, site.d_out)),
        S=zeros(lambda site: (count, k, k)),
        energy=zeros(lambda site: (count,)),
        rank=rank,
        names=names,
        sites=tuple(adapted),
    )
