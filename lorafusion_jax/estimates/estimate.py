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
from .parameters import trainable_count
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
      seed_mode: how seeds run: `batched`, best on accelerators, or `sequential`, best on a CPU (see `training.seeds`).
      device: kind of device.
      load_in: what base and pool are held in.
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
      activation_bytes: ranking, training or evaluation, whichever takes most, at the batch that takes most. Whole
        modules that are read to be ranked, and are fused in a basis, count here.
      peak_bytes: the sum of these bytes.
    """

    trainable: int
    forward_flops: float
    training_flops: float
    evaluation_flops: float
    weights_bytes: int
    pool_bytes: int
    state_bytes: int
    activation_bytes: int
    peak_bytes: int


def estimate(config: Architecture, method: str, work: Workload, settings: Settings) -> Cost:
    """Return the cost of one method on one task.

    Args:
      config: the base model.
      method: one of `method_names()`; `-mix` and `-sum` set another composition than the recipe's.
      work: the task's batches.
      settings: settings of the run.

    Raises:
      ValueError: an unknown method or target, a number below its least, or too few rows for a few-shot prompt.
    """
    check(method, settings)
    update, trainable = update_of(method, settings), trained_numbers(config, method, settings)
    entry, recipe = _of(method, settings)
    if entry.answers == "nothing":
        return Cost(0, 0.0, 0.0, 0.0, 0, 0, 0, 0, 0)
    steps = entry.learns == "trained"
    asked = work.few_shot if entry.answers == "examples" else work.test
    if asked is None:
        raise ValueError(f"the task has too few training rows for {recipe.shots} examples in a prompt: lower shots")
    batches = work.search if entry.learns in ("trained", "searched") else asked.rows
    weights = weights_bytes(config, settings.load_in)
    pool = pool_bytes(config, update, settings.load_in)
    state = _seeds(entry, settings) * state_bytes(trainable) if steps else 0
    activations = _activation_bytes(config, entry, recipe, work, asked, settings, trainable)
    return Cost(
        trainable=trainable,
        forward_flops=max(forward_flops(config, shape, update) for shape in set(batches)),
        training_flops=_training_flops(config, entry, recipe, work, settings, trainable),
        evaluation_flops=_evaluation_flops(config, asked, work.new_tokens, update),
        weights_bytes=weights,
        pool_bytes=pool,
        state_bytes=state,
        activation_bytes=activations,
        peak_bytes=weights + pool + state + activations,
    )


def check(method: str, settings: Settings) -> None:
    """Raise ValueError for an unknown method, or settings that are not valid."""
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
    return _seeds(_of(method, settings)[0], settings)


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
    composed = [name for name, entry in METHODS.items() if _is_composed(entry)]
    return (*METHODS, *(f"{name}-{composition}" for name in composed for composition in ("mix", "sum")))


def _is_composed(entry: MethodEntry) -> bool:
    return entry.learns == "trained" and "coefficients" in entry.groups


def _of(method: str, settings: Settings) -> tuple[MethodEntry, Any]:
    """Return a method by a name of `method_names()`, and its recipe, with its composition."""
    numbers = vars(settings.recipe)
    if method in METHODS:
        return METHODS[method], recipe_of(METHODS[method].recipe, numbers)
    name, _, composition = method.rpartition("-")
    entry = find(name)
    return entry, recipe_of(entry.recipe, numbers | {"composition": composition})


def _seeds(entry: MethodEntry, settings: Settings) -> int:
    return settings.seeds if entry.seeded else 1


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


def _evaluation_flops(config: Architecture, asked: EvaluationShapes, new_tokens: int, update: Update) -> float:
    """Return the FLOPs of generation, of the loss and of the options; each of these programs reads the source."""
    generated = sum(generation_flops(config, s._replace(target=new_tokens), update) for s in asked.rows)
    return generated + sum(forward_flops(config, shape, update) for shape in (*asked.rows, *asked.options))


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
    update, seeds = entry.update(recipe, settings.fused(recipe)), _seeds(entry, settings)
    how: Any = {"seed_mode": settings.seed_mode, "device": settings.device, "load_in": settings.load_in}
    evaluation = partial(evaluation_bytes, config, update=update, **how)
    step = partial(step_bytes, config, update=update, seeds=seeds, **how)

    def asking(shapes: Shapes, new_tokens: int, members: int = 1) -> list[int]:
        return [evaluation(shape, new_tokens=new_tokens, seeds=seeds * members) for shape in set(shapes)]

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
