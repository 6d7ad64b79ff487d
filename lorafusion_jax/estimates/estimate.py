"""Estimates of trainable numbers, FLOPs and memory for one method on one task, before anything is loaded."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

from ..checks import at_least
from ..methods import METHODS, find
from ..methods.entry import MethodEntry, PlannedPool, Update
from ..methods.fusion import choice_of
from ..methods.recipes import basis_of, modules_of, recipe_of
from ..models.architecture import Architecture
from ..runs.options import LoadIn
from ..training.recipe import Recipe
from ..training.seeds import SeedMode
from .flops import forward_flops, generation_flops, step_flops
from .memory import Device, evaluation_bytes, pool_bytes, state_bytes, step_bytes, weights_bytes
from .params import trainable_count
from .workload import EvaluationShapes, Shapes, Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all runs of a matrix share.

    Attributes:
      recipe: numbers of fusion, search and training; a method of another recipe has those that both share.
      rank: rank of the pool's modules.
      targets: the linear maps that they adapt; None for the family's own choice.
      pool: number of modules in memory (those that any seed draws); None for those of one seed.
      seeds: number of seeds of every method that draws anything.
      seed_mode: mode of the seeds (see `training.seeds`).
      device: kind of device.
      load_in: precision of base and pool.
    """

    recipe: Recipe = Recipe()
    rank: int = 16
    targets: tuple[str, ...] | None = None
    pool: int | None = None
    seeds: int = 5
    seed_mode: SeedMode = "sequential"
    device: Device = "cpu"
    load_in: LoadIn = "full"

    def fused(self, recipe: Recipe) -> PlannedPool:
        """Return the modules that a method with this recipe fuses."""
        return PlannedPool(self.rank, self.pool or modules_of(recipe), self.targets, self.device == "accelerator")


class Cost(NamedTuple):
    """Trainable numbers, FLOPs and memory of one method on one task.

    FLOPs are those of one seed. Bytes are those of the one program that runs all seeds, which share weights and pool.

    Attributes:
      trainable: number of trainable numbers of one seed.
      forward_flops: forward pass of the largest batch that is trained or searched on, else of the largest test batch.
      training_flops: ranking the pool's modules, all steps and validations; or the search.
      evaluation_flops: generating up to the token limit for the test rows, their loss and their options.
      weights_bytes: the base's weights.
      pool_bytes: the modules and the terms of their norms.
      state_bytes: trained numbers, Adam's moments and the best numbers so far, of all seeds.
      activation_bytes: ranking, training or evaluation, the most that any of them takes at its largest batch. Whole
        modules that are read to be ranked, and are fused in a basis, count here.
      peak_bytes: the sum of these bytes.
    """

    trainable: int = 0
    forward_flops: float = 0.0
    training_flops: float = 0.0
    evaluation_flops: float = 0.0
    weights_bytes: int = 0
    pool_bytes: int = 0
    state_bytes: int = 0
    activation_bytes: int = 0
    peak_bytes: int = 0


def estimate(config: Architecture, method: str, work: Workload, settings: Settings) -> Cost:
    """Return the cost of one method on one task.

    The method is one of `method_names()`; `-mix` and `-sum` set another composition than the recipe's.

    Raises:
      ValueError: an unknown method or target, a number below its least, or too few rows for a few-shot prompt.
    """
    _check(method, settings)
    update, trainable = update_of(method, settings), trained_numbers(config, method, settings)
    entry, recipe = _of(method, settings)
    if entry.answers == "nothing":
        return Cost()
    asked = work.few_shot if entry.answers == "examples" else work.test
    if asked is None:
        raise ValueError(f"the task has too few training rows for {recipe.shots} examples in a prompt: lower shots")
    batches = work.search if entry.learns in ("trained", "searched") else asked.rows
    generated = sum(generation_flops(config, s._replace(target=work.new_tokens), update) for s in asked.rows)
    scored = sum(forward_flops(config, shape, update) for shape in (*asked.rows, *asked.options))
    parts = {
        "weights_bytes": weights_bytes(config, settings.load_in),
        "pool_bytes": pool_bytes(config, update, settings.load_in),
        "state_bytes": seeds_of(method, settings) * state_bytes(trainable) if entry.learns == "trained" else 0,
        "activation_bytes": _activation_bytes(config, entry, recipe, work, asked, settings, trainable),
    }
    return Cost(
        trainable=trainable,
        forward_flops=max(forward_flops(config, shape, update) for shape in set(batches)),
        training_flops=_training_flops(config, entry, recipe, work, settings, trainable),
        evaluation_flops=generated + scored,  # each of these programs reads the source
        peak_bytes=sum(parts.values()),
        **parts,
    )


def _check(method: str, settings: Settings) -> None:
    if method not in method_names():
        raise ValueError(f"no method {method!r}: choose one of {', '.join(method_names())}")
    _, recipe = _of(method, settings)
    recipe.check()
    at_least(1, rank=settings.rank, seeds=settings.seeds)
    modules = modules_of(recipe)
    if settings.pool is not None and settings.pool < modules:
        raise ValueError(
            f"a pool of {settings.pool} for seeds that draw {modules} modules each: it needs at least as many"
        )


def seeds_of(method: str, settings: Settings) -> int:
    """Return the number of seeds of a method: one if it draws nothing."""
    return settings.seeds if _of(method, settings)[0].seeded else 1


def update_of(method: str, settings: Settings) -> Update:
    """Return the arithmetic of a method at the adapted matrices."""
    entry, recipe = _of(method, settings)
    return entry.update(recipe, settings.fused(recipe))


def trained_numbers(config: Architecture, method: str, settings: Settings) -> int:
    """Return the number of numbers that a method trains or searches for one seed."""
    entry, recipe = _of(method, settings)
    return sum(trainable_count(entry, config, recipe, settings.fused(recipe)).values())


def method_names() -> tuple[str, ...]:
    """Return the names that can be planned: all methods, and fusions with a composition in the name."""
    composed = [n for n, entry in METHODS.items() if entry.learns == "trained" and "coefficients" in entry.groups]
    return (*METHODS, *(f"{name}-{composition}" for name in composed for composition in ("mix", "sum")))


def _of(method: str, settings: Settings) -> tuple[MethodEntry, Any]:
    """Return a method by a name of `method_names()`, and its recipe, with its composition."""
    numbers = vars(settings.recipe)
    if method not in METHODS:
        method, _, composition = method.rpartition("-")
        numbers = numbers | {"composition": composition}
    entry = find(method)
    return entry, recipe_of(entry.recipe, numbers)


def _ranking(entry: MethodEntry, recipe: Recipe, settings: Settings) -> Update | None:
    """Return the arithmetic of the pass that ranks all modules in memory, whole or in a basis; None without one."""
    if choice_of(recipe) == "draw" or "coefficients" not in entry.groups:
        return None
    basis, modules = None if choice_of(recipe) == "gradient" else basis_of(recipe), settings.fused(recipe)
    return entry.update(recipe_of(entry.recipe, vars(recipe) | {"basis": basis, "modules": modules.pool}), modules)


def _training_flops(
    config: Architecture, entry: MethodEntry, recipe: Recipe, work: Workload, settings: Settings, trainable: int
) -> float:
    """Return the FLOPs before evaluation (training or search), for one seed."""
    update = entry.update(recipe, settings.fused(recipe))
    if entry.learns == "trained":
        steps = sum(step_flops(config, shape, update, trainable=trainable) for shape in work.steps)
        if (ranking := _ranking(entry, recipe, settings)) is not None:
            steps += sum(step_flops(config, shape, ranking, trainable=0) for shape in work.search)
        return steps + work.epochs * forward_flops(config, work.validation, update)
    once = sum(forward_flops(config, shape, update) for shape in work.search)
    return entry.evaluations(recipe, modules_of(recipe)) * once


def _activation_bytes(
    config: Architecture,
    entry: MethodEntry,
    recipe: Recipe,
    work: Workload,
    asked: EvaluationShapes,
    settings: Settings,
    trainable: int,
) -> int:
    """Return the largest memory of training, search or evaluation in addition to the arguments, for all seeds."""
    update, seeds = entry.update(recipe, settings.fused(recipe)), settings.seeds if entry.seeded else 1
    how: Any = {"seed_mode": settings.seed_mode, "device": settings.device, "load_in": settings.load_in}
    step = partial(step_bytes, config, update=update, seeds=seeds, **how)

    def asking(shapes: Shapes, new_tokens: int, members: int = 1) -> list[int]:
        return [
            evaluation_bytes(config, shape, new_tokens, update, seeds=seeds * members, **how) for shape in set(shapes)
        ]

    needed = asking(asked.rows, work.new_tokens) + asking(asked.options, 0)
    if entry.learns == "trained":
        needed += [step(shape, trainable=trainable) for shape in set(work.steps)]
        if (ranking := _ranking(entry, recipe, settings)) is not None:
            whole = pool_bytes(config, ranking, settings.load_in) if type(ranking) is not type(update) else 0
            of_pass = partial(step, update=ranking, trainable=settings.fused(recipe).pool)
            needed += [whole + of_pass(shape) for shape in set(work.search)]
    if entry.learns == "searched":
        needed += asking(work.search, 0, entry.at_once(recipe))
    return max(needed)
