"""What one method needs on one task: trainable numbers, FLOPs and memory, before anything is loaded."""

import dataclasses
import math
from typing import NamedTuple

from ..models.t5 import T5Config
from ..tasks import bucket
from .cost import Shape, Update, adapted, forward_flops, model_size, step_flops
from .memory import Device, evaluation_bytes, pool_bytes, state_bytes, step_bytes, weights_bytes
from .options import Recipe
from .sweep import Path
from .workload import Workload

METHODS = (
    *("zero-shot", "few-shot", "constant", "mean", "single", "lorahub", "cma"),
    *("fusion", "fusion-mix", "fusion-sum", "coefficients", "coefficients-mix", "coefficients-sum"),
    *("magnitudes", "lora", "dora", "vera", "full"),
)
SEEDLESS = ("zero-shot", "constant")
_SEARCHES = ("single", "lorahub", "cma")
_UNTRAINED = (*SEEDLESS, "few-shot", "mean", *_SEARCHES)
_LONGEST = 2048  # tokens of an input, as `tasks.encode` cuts it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a matrix share.

    Attributes:
      recipe: of fusion and training.
      rank: of the pool's modules.
      pool: modules in memory, those that any seed draws; None for no more than one seed's.
      targets: the linear maps that are adapted.
      vera_rank: of VeRA.
      shots: examples before the question of a few-shot prompt.
      population: of CMA-ES, every member of which is an evaluation in each of the recipe's; None for 4 + 3 ln N.
      seeds: of every method that draws anything.
      path: how they run: `vmap`, best on accelerators, or `map`, best on a CPU (see `sweep`).
      device: where.
    """

    recipe: Recipe = Recipe()
    rank: int = 16
    pool: int | None = None
    targets: tuple[str, ...] = ("q", "v")
    vera_rank: int = 128
    shots: int = 5
    population: int | None = None
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
      evaluation_flops: of generating for the test rows, to the last token allowed, and of their loss.
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


def estimate(config: T5Config, method: str, work: Workload, settings: Settings = Settings()) -> Cost:
    """Return what one method needs on one task.

    Args:
      config: the base model.
      method: one of `METHODS`; `-mix` and `-sum` are another composition than the recipe's.
      work: the task's batches.
      settings: of the run.

    Raises:
      ValueError: an unknown method or target, or a number below its least.
    """
    check(method, settings)
    if method == "constant":
        return Cost(0, 0.0, 0.0, 0.0, 0, 0, 0, 0, 0)
    update, trainable = update_of(method, settings), trainable_count(config, method, settings)
    trained = method not in _UNTRAINED
    seeds = seeds_of(method, settings)
    test = _prompted(work, settings.shots) if method == "few-shot" else work.test
    batches = work.search if trained or method in _SEARCHES else test
    weights, pool = weights_bytes(config), pool_bytes(config, update)
    state = seeds * state_bytes(config, update, trainable=trainable) if trained else 0
    side_by_side = seeds if settings.path == "vmap" else 1
    of_evaluation = {"device": settings.device, "batched": side_by_side > 1}
    needed = [evaluation_bytes(config, shape, work.new_tokens, update, **of_evaluation) for shape in set(test)]
    if trained:
        shapes = set(work.steps)
        needed += [step_bytes(config, s, update, trainable=trainable, device=settings.device) for s in shapes]
    elif method in _SEARCHES:
        members = _population(settings) if method == "cma" and settings.path == "vmap" else 1
        needed += [members * evaluation_bytes(config, s, 0, update, **of_evaluation) for s in set(work.search)]
    activations = side_by_side * max(needed)
    return Cost(
        trainable=trainable,
        forward_flops=max(forward_flops(config, shape, update) for shape in set(batches)),
        training_flops=_training(config, method, work, trainable, settings),
        evaluation_flops=_evaluation(config, test, work.new_tokens, update),
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
    counts = {"rank": settings.rank, "vera_rank": settings.vera_rank, "shots": settings.shots, "seeds": settings.seeds}
    counts |= {"modules": recipe.modules, "lora_rank": recipe.lora_rank, "evaluations": recipe.evaluations}
    for name, count in (counts | {"population": _population(settings)}).items():
        if count < 1:
            raise ValueError(f"{name} is {count}: wanted at least 1")
    if settings.pool is not None and settings.pool < recipe.modules:
        raise ValueError(
            f"a pool of {settings.pool} for seeds that draw {recipe.modules} modules each: it holds at least as many"
        )


def seeds_of(method: str, settings: Settings) -> int:
    """Return how many seeds a method has: one where nothing is drawn."""
    return 1 if method in SEEDLESS else settings.seeds


def update_of(method: str, settings: Settings) -> Update:
    """Return what a method does to the adapted matrices."""
    recipe, targets = settings.recipe, settings.targets
    name, _, composition = (
        method.partition("-") if method.startswith(("fusion-", "coefficients-")) else (method, "", "")
    )
    if name in ("zero-shot", "few-shot", "constant"):
        return Update(kind="none", targets=targets)
    if name in ("lora", "dora"):
        return Update(kind=name, rank=recipe.lora_rank, targets=targets)
    if name == "vera":
        return Update(kind="vera", rank=settings.vera_rank, targets=targets)
    if name in ("magnitudes", "full"):
        return Update(kind=name, targets=targets)
    return Update(
        kind="mix" if "mix" in (composition or recipe.composition) or name in ("lorahub", "cma") else "sum",
        rank=settings.rank,
        modules=1 if name == "single" else recipe.modules,
        pool=settings.pool or recipe.modules,
        magnitudes=name == "fusion",
        targets=targets,
    )


def trainable_count(config: T5Config, method: str, settings: Settings) -> int:
    """Return how many numbers a method trains for one seed."""
    recipe = settings.recipe
    there = adapted(config, settings.targets)
    matrices = [site for site in there.values() for _ in range(site.layers)]
    magnitudes = sum(site.d_out for site in matrices)
    factors = sum(recipe.lora_rank * (site.d_in + site.d_out) for site in matrices)
    blocks = sum({name.partition(".")[0]: site.layers for name, site in there.items()}.values())
    columns = {"global": 1, "block": blocks, "site": len(matrices), "rank": len(matrices) * settings.rank}
    coefficients = recipe.modules * columns[recipe.granularity]
    return {
        "lorahub": recipe.modules,
        "cma": recipe.modules,
        "fusion": coefficients + magnitudes,
        "coefficients": coefficients,
        "magnitudes": magnitudes,
        "lora": factors,
        "dora": factors + magnitudes,
        "vera": sum(settings.vera_rank + site.d_out for site in matrices),
        "full": model_size(config),
    }.get(method.removesuffix("-mix").removesuffix("-sum"), 0)


def _training(config: T5Config, method: str, work: Workload, trainable: int, settings: Settings) -> float:
    """Return the FLOPs of what comes before evaluation."""
    update = update_of(method, settings)
    if method not in _UNTRAINED:
        steps = sum(step_flops(config, shape, update, trainable=trainable) for shape in work.steps)
        return steps + (work.epochs * forward_flops(config, work.validation, update) if work.validation else 0.0)
    once = sum(forward_flops(config, shape, update) for shape in work.search)
    evaluations = settings.recipe.evaluations
    passes = {
        "single": settings.recipe.modules,
        "lorahub": evaluations,
        "cma": evaluations * _population(settings),
    }
    return passes.get(method, 0) * once


def _evaluation(config: T5Config, test: tuple[Shape, ...], new_tokens: int, update: Update) -> float:
    """Return the FLOPs of generation and of the loss, which are two programs with an encoder each."""
    spoken = (shape._replace(target=new_tokens) for shape in test)
    return sum(forward_flops(config, shape, update) for shape in (*test, *spoken))


def _population(settings: Settings) -> int:
    """Return the members of a generation; by default CMA-ES's own rule for N dimensions (Hansen)."""
    if settings.population is not None:
        return settings.population
    return 4 + int(3 * math.log(max(settings.recipe.modules, 1)))


def _prompted(work: Workload, shots: int) -> tuple[Shape, ...]:
    """Return the test batches with examples as long as the longest training row before every question."""
    example = max(shape.source + shape.target for shape in work.search)
    return tuple(shape._replace(source=min(bucket(shape.source + shots * example), _LONGEST)) for shape in work.test)
