"""What one method needs on one task: trainable numbers, FLOPs and memory, before anything is loaded."""

import dataclasses
from functools import partial
from typing import NamedTuple, get_args

from ..adapters.updates import Composition
from ..checks import at_least
from ..models.architecture import Architecture, targeted
from ..runs.options import GIVEN, UNTRAINED, MethodName, Recipe
from ..training.seeds import Path
from .flops import Update, forward_flops, generation_flops, step_flops
from .memory import Device, evaluation_bytes, pool_bytes, state_bytes, step_bytes, weights_bytes
from .parameters import size, trainable
from .workload import Asked, Shapes, Workload

_COMPOSED: dict[str, tuple[str, Composition]] = {
    "fusion-mix": ("fusion", "mix"),
    "fusion-sum": ("fusion", "sum"),
    "coefficients-mix": ("coefficients", "mix"),
    "coefficients-sum": ("coefficients", "sum"),
}
METHODS: tuple[str, ...] = (*get_args(MethodName), *_COMPOSED)
_SEARCHES = ("single", "lorahub", "cma")
_WITHOUT_STEPS = (*UNTRAINED, *GIVEN, *_SEARCHES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a matrix share.

    Attributes:
      recipe: of fusion, search and training.
      rank: of the pool's modules.
      targets: the linear maps that they adapt; None for the family's own choice.
      pool: modules in memory, those that any seed draws; None for no more than one seed's.
      seeds: of every method that draws anything.
      path: how they run: `vmap`, best on accelerators, or `map`, best on a CPU (see `sweep`).
      device: where.
    """

    recipe: Recipe = Recipe()
    rank: int = 16
    targets: tuple[str, ...] | None = None
    pool: int | None = None
    seeds: int = 5
    path: Path = "map"
    device: Device = "cpu"


class Cost(NamedTuple):
    """What one method needs on one task.

    FLOPs are those of one seed; bytes those of the one program that runs all seeds, which share weights and pool.

    Attributes:
      trainable: numbers, of one seed.
      forward_flops: of the largest batch that is trained or searched on, else of the largest test batch.
      training_flops: of all steps and validations, or of the search.
      evaluation_flops: of generating for the test rows to the last token allowed, of their loss and their options.
      weights_bytes: of the base.
      pool_bytes: of the modules and their Gram terms.
      state_bytes: what is trained, Adam's moments and the best so far, of all seeds.
      activation_bytes: of training or evaluation, whichever takes more, at the batch that takes most.
      peak_bytes: all that together.
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
    """Return what one method needs on one task.

    Args:
      config: the base model.
      method: one of `METHODS`; `-mix` and `-sum` are another composition than the recipe's.
      work: the task's batches.
      settings: of the run.

    Raises:
      ValueError: an unknown method or target, a number below its least, or too few rows for a few-shot prompt.
    """
    check(method, settings)
    if method == "constant":
        return Cost(0, 0.0, 0.0, 0.0, 0, 0, 0, 0, 0)
    update, trainable = update_of(method, settings), trainable_count(config, method, settings)
    steps = method not in _WITHOUT_STEPS
    asked = work.few_shot if method == "few-shot" else work.test
    if asked is None:
        raise ValueError(
            f"the task has too few training rows for {settings.recipe.shots} examples in a prompt: lower shots"
        )
    batches = work.search if steps or method in _SEARCHES else asked.rows
    weights, pool = weights_bytes(config), pool_bytes(config, update)
    state = seeds_of(method, settings) * state_bytes(trainable) if steps else 0
    activations = _activation_bytes(config, method, work, asked, settings)
    return Cost(
        trainable=trainable,
        forward_flops=max(forward_flops(config, shape, update) for shape in set(batches)),
        training_flops=_training_flops(config, method, work, settings),
        evaluation_flops=_evaluation_flops(config, asked, work.new_tokens, update),
        weights_bytes=weights,
        pool_bytes=pool,
        state_bytes=state,
        activation_bytes=activations,
        peak_bytes=weights + pool + state + activations,
    )


def check(method: str, settings: Settings) -> None:
    """Raise ValueError for a method that there is not, or settings that no run can have."""
    if method not in METHODS:
        raise ValueError(f"no method {method!r}: choose of {', '.join(METHODS)}")
    recipe = settings.recipe
    counts = {name: getattr(recipe, name) for name in ("modules", "lora_rank", "vera_rank", "epochs", "batch_size")}
    counts |= {name: getattr(recipe, name) for name in ("evaluations", "generations", "population", "shots")}
    at_least(1, **counts, rank=settings.rank, seeds=settings.seeds)
    if settings.pool is not None and settings.pool < recipe.modules:
        raise ValueError(
            f"a pool of {settings.pool} for seeds that draw {recipe.modules} modules each: it must hold at least those"
        )


def seeds_of(method: str, settings: Settings) -> int:
    """Return how many seeds a method has: one where none changes anything."""
    return 1 if method == "zero-shot" else settings.seeds


def update_of(method: str, settings: Settings) -> Update:
    """Return what a method does to the adapted matrices."""
    recipe = settings.recipe
    name, composition = _COMPOSED.get(method, (method, recipe.composition))
    if name in UNTRAINED:
        return Update(kind="none")
    if name in ("lora", "dora", "vera", "magnitudes", "full"):
        rank = recipe.vera_rank if name == "vera" else recipe.lora_rank
        return Update(kind=name, rank=rank, targets=recipe.lora_targets)
    # The compositions of LoraHub, of the mean and of the best single module are no matter of the recipe. A merge, made
    # once, counts as the mix whose rank it has.
    fixed: dict[str, Composition] = {"lorahub": "mix", "cma": "mix", "merge": "mix", "mean": "sum", "single": "sum"}
    kind = fixed.get(name, composition)
    return Update(
        kind=kind,
        rank=settings.rank,
        modules=recipe.modules,
        pool=settings.pool or recipe.modules,
        magnitudes=name == "fusion",
        targets=settings.targets,
    )


def trainable_count(config: Architecture, method: str, settings: Settings) -> int:
    """Return how many numbers a method trains, or searches, for one seed."""
    recipe, (name, _) = settings.recipe, _COMPOSED.get(method, (method, ""))
    adapted = targeted(config, update_of(method, settings).targets)
    found = trainable(adapted, rank=recipe.lora_rank, vera_rank=recipe.vera_rank)
    columns = {"global": 1, "block": found.blocks, "site": found.matrices, "rank": found.matrices * settings.rank}
    coefficients = recipe.modules * columns[recipe.granularity]
    counts = {
        "lorahub": recipe.modules,
        "cma": recipe.modules,
        "fusion": coefficients + found.magnitudes,
        "coefficients": coefficients,
        "magnitudes": found.magnitudes,
        "lora": found.lora,
        "dora": found.lora + found.magnitudes,
        "vera": found.vera,
    }
    return size(config) if name == "full" else counts.get(name, 0)


def _training_flops(config: Architecture, method: str, work: Workload, settings: Settings) -> float:
    """Return the FLOPs of what comes before evaluation, for one seed."""
    recipe, update = settings.recipe, update_of(method, settings)
    if method not in _WITHOUT_STEPS:
        trainable = trainable_count(config, method, settings)
        steps = sum(step_flops(config, shape, update, trainable=trainable) for shape in work.steps)
        return steps + work.epochs * forward_flops(config, work.validation, update)
    evaluations = {
        "single": recipe.modules,
        "lorahub": recipe.evaluations,
        "cma": recipe.generations * recipe.population,
    }
    return evaluations.get(method, 0) * sum(forward_flops(config, shape, update) for shape in work.search)


def _evaluation_flops(config: Architecture, asked: Asked, new_tokens: int, update: Update) -> float:
    """Return the FLOPs of generation, of the loss and of the options: programs that each read the source."""
    generated = sum(generation_flops(config, s._replace(target=new_tokens), update) for s in asked.rows)
    return generated + sum(forward_flops(config, shape, update) for shape in (*asked.rows, *asked.options))


def _activation_bytes(config: Architecture, method: str, work: Workload, asked: Asked, settings: Settings) -> int:
    """Return the most that training, search or evaluation needs beside its arguments, all seeds together."""
    update, seeds = update_of(method, settings), seeds_of(method, settings)
    evaluation = partial(evaluation_bytes, config, update=update, path=settings.path, device=settings.device)
    step = partial(step_bytes, config, update=update, path=settings.path, device=settings.device, seeds=seeds)

    def asking(shapes: Shapes, new_tokens: int, members: int = 1) -> list[int]:
        return [evaluation(shape, new_tokens=new_tokens, seeds=seeds * members) for shape in set(shapes)]

    needed = asking(asked.rows, work.new_tokens) + asking(asked.options, 0)
    if method not in _WITHOUT_STEPS:
        trainable = trainable_count(config, method, settings)
        needed += [step(shape, trainable=trainable) for shape in set(work.steps)]
    if method in _SEARCHES:
        needed += asking(work.search, 0, settings.recipe.population if method == "cma" else 1)
    return max(needed)
