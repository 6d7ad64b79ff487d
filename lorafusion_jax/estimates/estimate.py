"""Estimates of trainable parameters, FLOPs and memory for one method on one task, before anything is loaded."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

from ..loading.spec import LoadIn
from ..methods import find
from ..methods.entry import MethodEntry, PlannedPool, Update
from ..methods.fusion import choice_of
from ..methods.recipes import basis_of, modules_of, recipe_of
from ..models.architecture import Architecture
from ..support.checks import at_least
from ..training.recipe import Recipe
from ..training.seeds import SeedMode
from .flops import forward_flops, generation_flops, step_flops
from .memory import (
    Device,
    evaluation_bytes,
    pool_bytes,
    state_bytes,
    step_bytes,
    weights_bytes,
)
from .params import trainable_count
from .workload import Shapes, Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all runs of a matrix share."""

    # numbers of fusion, search and training; a method of another recipe has those that both share
    recipe: Recipe = Recipe()
    rank: int = 16  # rank of the pool's modules
    targets: tuple[str, ...] | None = (
        None  # the linear maps that they adapt; None for the family's own choice
    )
    pool: int | None = (
        None  # number of modules in memory (those that any seed draws); None for those of one seed
    )
    seeds: int = 5  # number of seeds of every method that draws anything
    seed_mode: SeedMode = "sequential"  # mode of the seeds (see `training.seeds`)
    device: Device = "cpu"
    load_in: LoadIn = "full"  # precision of base and pool

    def fused(self, config: Architecture, recipe: Recipe) -> PlannedPool:
        """Return the modules that a method with this recipe fuses."""
        forms = self.device == "cpu" and config.dtype == "float32"
        pool = self.pool or modules_of(recipe)
        return PlannedPool(
            self.rank, pool, self.targets, self.device == "accelerator", forms
        )


class Cost(NamedTuple):
    """Trainable parameters, FLOPs and memory of one method on one task.

    FLOPs are those of one seed. Bytes are those of the one program that runs all seeds, which share weights and pool.
    """

    trainable: int = 0  # parameters that one seed trains
    # forward pass of the largest batch that is trained or searched on, else of the largest test batch
    forward_flops: float = 0.0
    training_flops: float = (
        0.0  # ranking the pool's modules, all steps and validations; or the search
    )
    evaluation_flops: float = 0.0  # generating up to the token limit for the test rows, their loss and their options
    weights_bytes: int = 0  # the base's weights
    pool_bytes: int = 0  # the modules and the terms of their norms
    state_bytes: int = 0  # trained parameters, Adam's moments and the best numbers so far, of all seeds
    # ranking, training or evaluation, the most that any of them takes at its largest batch. Whole modules that are read
    # to be ranked, and are fused in a basis, count here
    activation_bytes: int = 0
    peak_bytes: int = 0  # the sum of these bytes


def estimate(
    config: Architecture, method: str, work: Workload, settings: Settings
) -> Cost:
    """Return the cost of one method on one task.

    Raises:
      ValueError: an unknown method or target, a number below its least, or too few rows for a few-shot prompt.
    """
    entry, recipe = _of(method, settings)
    recipe.check()
    at_least(1, rank=settings.rank, seeds=settings.seeds)
    if settings.pool is not None and settings.pool < (modules := modules_of(recipe)):
        raise ValueError(
            f"a pool of {settings.pool} for seeds that draw {modules} modules each: give at least as many"
        )
    update = update_of(config, method, settings)
    trainable = trained_numbers(config, method, settings)
    if entry.answers == "nothing":
        return Cost()
    asked = work.few_shot if entry.answers == "examples" else work.test
    if asked is None:
        raise ValueError(
            f"the task has too few training rows for {recipe.shots} examples in a prompt: lower shots"
        )
    ranking = _ranking(config, entry, recipe, settings)
    seeds = seeds_of(method, settings)
    state = 0
    how: Any = {
        "seed_mode": settings.seed_mode,
        "device": settings.device,
        "load_in": settings.load_in,
    }
    step = partial(step_bytes, config, seeds=seeds, **how)

    def passes(shapes: Shapes) -> list[float]:
        return [forward_flops(config, shape, update) for shape in shapes]

    def asking(shapes: Shapes, new_tokens: int) -> list[int]:
        return [
            evaluation_bytes(config, one, new_tokens, update, seeds=seeds, **how)
            for one in set(shapes)
        ]

    activations = asking(asked.rows, work.new_tokens) + asking(asked.options, 0)
    generated = sum(
        generation_flops(config, s._replace(target=work.new_tokens), update)
        for s in asked.rows
    )
    if entry.learns == "trained":
        state = seeds * state_bytes(trainable)
        training = sum(
            step_flops(config, shape, update, trainable=trainable)
            for shape in work.steps
        )
        activations += [
            step(shape, update=update, trainable=trainable) for shape in set(work.steps)
        ]
        if ranking is not None:
            training += sum(
                step_flops(config, shape, ranking, trainable=0) for shape in work.search
            )
            whole = (
                pool_bytes(config, ranking, settings.load_in)
                if type(ranking) is not type(update)
                else 0
            )
            of_pass = partial(
                step, update=ranking, trainable=settings.fused(config, recipe).pool
            )
            activations += [whole + of_pass(shape) for shape in set(work.search)]
        training += work.epochs * forward_flops(config, work.validation, update)
    else:
        training = entry.evaluations(recipe, modules_of(recipe)) * sum(
            passes(work.search)
        )
    if entry.learns == "searched":
        activations += asking(work.search, 0)
    of_weights = weights_bytes(config, settings.load_in)
    of_pool = pool_bytes(config, update, settings.load_in)
    return Cost(
        trainable=trainable,
        forward_flops=max(
            passes(
                work.search if entry.learns in ("trained", "searched") else asked.rows
            )
        ),
        training_flops=training,
        # Each of these programs reads the source.
        evaluation_flops=generated + sum(passes((*asked.rows, *asked.options))),
        peak_bytes=of_weights + of_pool + state + max(activations),
        weights_bytes=of_weights,
        pool_bytes=of_pool,
        state_bytes=state,
        activation_bytes=max(activations),
    )


def seeds_of(method: str, settings: Settings) -> int:
    """Return the number of seeds of a method: one if it draws nothing."""
    return settings.seeds if _of(method, settings)[0].seeded else 1


def update_of(config: Architecture, method: str, settings: Settings) -> Update:
    """Return the arithmetic of a method at the adapted matrices."""
    entry, recipe = _of(method, settings)
    return entry.update(recipe, settings.fused(config, recipe))


def trained_numbers(config: Architecture, method: str, settings: Settings) -> int:
    """Return the number of parameters that a method trains or searches for one seed."""
    entry, recipe = _of(method, settings)
    return sum(
        trainable_count(entry, config, recipe, settings.fused(config, recipe)).values()
    )


def _of(method: str, settings: Settings) -> tuple[MethodEntry, Any]:
    """Return a method by its name, and its recipe."""
    entry = find(method)
    return entry, recipe_of(entry.recipe, vars(settings.recipe))


def _ranking(
    config: Architecture, entry: MethodEntry, recipe: Recipe, settings: Settings
) -> Update | None:
    """Return the arithmetic of the pass that ranks all modules in memory, whole or in a basis; None without one."""
    if choice_of(recipe) == "draw" or "coefficients" not in entry.groups:
        return None
    basis = None if choice_of(recipe) == "gradient" else basis_of(recipe)
    modules = settings.fused(config, recipe)
    return entry.update(
        recipe_of(
            entry.recipe, vars(recipe) | {"basis": basis, "modules": modules.pool}
        ),
        modules,
    )
