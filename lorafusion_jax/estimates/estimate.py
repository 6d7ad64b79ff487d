"""Estimates of trainable parameters, FLOPs and memory of methods on tasks, before anything is loaded.

Programs are traced from shapes at the least and the largest batch; those of other batches are interpolated.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from ..methods import find
from ..methods.entry import MethodEntry, PlannedPool, basis_of, modules_of, recipe_of
from ..methods.fusion import choice_of
from ..models.architecture import Architecture, rough_operations
from ..models.generate import generate
from ..support.checks import at_least
from ..support.options import LoadIn
from ..tasks import Batch, Rows
from ..training.fit import recipe_rates
from ..training.loss import batch_logits, log_likelihood
from ..training.mesh import SeedMode
from ..training.problem import Problem
from ..training.recipe import Recipe
from ..training.step import TrainState, fusion_step, init_state
from .params import AbstractProblem, abstract_problem, trainable_count
from .program import Program, traced
from .workload import EvaluationShapes, Shape, Workload

Device = Literal["cpu", "accelerator"]
Kind = Literal["step", "loss", "answers", "adapters"]


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
    seed_mode: SeedMode = "sequential"  # mode of the seeds (see `training.mesh`)
    device: Device = "cpu"
    load_in: LoadIn = "full"  # precision of base and pool

    def fused(self, recipe: Recipe) -> PlannedPool:
        """Return the modules that a method with this recipe fuses."""
        return PlannedPool(self.rank, self.pool or modules_of(recipe), self.targets)


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


@dataclasses.dataclass(frozen=True)
class Traced:
    """A method on shapes, whose programs are traced.

    Attributes:
      config: structure of the base model.
      entry: the method.
      recipe: its recipe, of the class that the entry names.
      settings: settings of the runs.
      seeds: number of seeds that are computed at once.
    """

    config: Architecture
    entry: MethodEntry
    recipe: Recipe
    settings: Settings
    seeds: int = 1

    def problem(self, *, seeds: int = 1, apart: bool = False) -> AbstractProblem:
        """Return the problem of some seeds, whose arrays are shapes (see `abstract_problem`)."""
        return abstract_problem(
            self.entry,
            self.config,
            self.recipe,
            self.settings.fused(self.recipe),
            self.settings.load_in,
            seeds=seeds,
            apart=apart,
        )

    @functools.cached_property
    def state(self) -> TrainState:
        """The state of one seed, as shapes."""
        with _tracing_for(self.settings.device):
            shapes = self.problem()
            return jax.eval_shape(
                lambda leaves: init_state(shapes.problem(leaves), jax.random.key(0)),
                shapes.leaves,
            )

    @functools.cached_property
    def frozen_bytes(self) -> tuple[int, int]:
        """Bytes of the base model, and of the pool with the terms that are computed from it."""
        with _tracing_for(self.settings.device):
            shapes = self.problem()
            base = jax.eval_shape(
                lambda leaves: jax.tree.leaves(shapes.problem(leaves).frozen.base),
                shapes.leaves,
            )
        return _bytes(base), _bytes(shapes.leaves[:-1]) - _bytes(base)

    # A plan of several tasks, and jobs of one method, trace the same programs.
    @functools.lru_cache(maxsize=512)  # noqa: B019 (equal methods share entries)
    def program(self, kind: Kind, shape: Shape) -> Program:
        """Return the FLOPs of one seed's step, loss or answers (of T tokens), and the bytes of all seeds together."""
        optimisation = self.recipe.optimisation(100)

        def computed(one: Problem, state: TrainState, batch: Batch) -> Any:
            if kind == "step":
                rates = recipe_rates(one.method, self.recipe, 1)
                rates = jax.tree.map(lambda rate: rate[0], rates)
                return fusion_step(state, batch, one, rates, optimisation=optimisation)
            if kind == "loss":
                logits, _ = batch_logits(state.params, batch, one)
                return log_likelihood(logits, jnp.asarray(batch.labels))
            model, adapters, _ = one.adapted_model(state.params)
            if kind == "adapters":
                return jax.tree.leaves(adapters)
            return generate(
                model,
                batch.input_ids,
                batch.input_mask,
                adapters,
                max_new_tokens=shape.target,
            )

        apart = (
            self.settings.device == "cpu"
            and kind != "loss"
            and "base" not in self.entry.groups
        )
        with _tracing_for(self.settings.device):
            shapes = self.problem(seeds=self.seeds, apart=apart)

            def of_seeds(state: TrainState, batch: Batch, leaves: list[Any]) -> Any:
                problem = shapes.problem(leaves)
                if self.seeds == 1:
                    return computed(problem, state, batch)
                return problem.over_seeds(computed, (state, batch))

            arguments = (self.state, _batch(shape))
            if self.seeds > 1:
                arguments = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(
                        (self.seeds, *leaf.shape), leaf.dtype
                    ),
                    arguments,
                )
            program = traced(
                of_seeds,
                *arguments,
                shapes.leaves,
                donated=kind == "step",
                trips=shape.target,
            )
        return Program(program.flops / self.seeds, program.bytes)


def program_of(
    config: Architecture, method: str, settings: Settings, kind: Kind, shape: Shape
) -> Program:
    """Return the FLOPs of one seed's step, loss or answers (of T tokens), and the bytes of all seeds together."""
    return _traced(config, method, settings).program(kind, shape)


def held_bytes(config: Architecture, method: str, settings: Settings) -> int:
    """Return the bytes of the base model, of the pool, and of all seeds' states of training."""
    run = _traced(config, method, settings)
    return sum(run.frozen_bytes) + seeds_of(method, settings) * _bytes(run.state)


def _traced(config: Architecture, method: str, settings: Settings) -> Traced:
    entry, recipe = _of(method, settings)
    seeds = seeds_of(method, settings) if settings.seed_mode == "batched" else 1
    return Traced(config, entry, recipe, settings, seeds)


def interpolated(
    method: Traced, kind: Kind, shapes: Iterable[Shape]
) -> Callable[[Shape], Program]:
    """Return a function from one of these shapes to a program.

    The least and the largest are traced. FLOPs are polynomials of second degree in the lengths, as is the rough number
    of operations by which programs of other shapes are interpolated.
    """

    def rough(shape: Shape) -> float:
        groups = shape.groups or ((shape.rows, shape.source, shape.target),)
        return rough_operations(
            method.config,
            shape.rows * shape.source,
            shape.rows * shape.target,
            groups,
        )

    ordered = sorted(set(shapes), key=rough)
    least = ordered[0]
    largest = ordered[-1]
    distance = rough(largest) - rough(least)

    def program(shape: Shape) -> Program:
        if shape in (least, largest):
            return method.program(kind, shape)
        share = (rough(shape) - rough(least)) / distance if distance else 1.0
        ends = zip(
            method.program(kind, least), method.program(kind, largest), strict=True
        )
        return Program(*(low + share * (high - low) for low, high in ends))

    return program


def estimate(
    config: Architecture, method: str, work: Workload, settings: Settings
) -> Cost:
    """Return the cost of one method on one task, as `estimates` does."""
    return estimates(config, method, [work], settings)[0]


def estimates(
    config: Architecture, method: str, works: Sequence[Workload], settings: Settings
) -> list[Cost]:
    """Return the costs of one method on several tasks, whose programs are interpolated between the same two.

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
    trainable = trained_numbers(config, method, settings)
    if entry.answers == "nothing":
        return [Cost() for _ in works]

    seeds = seeds_of(method, settings)
    run = _traced(config, method, settings)
    weights, pool = run.frozen_bytes
    step = interpolated(run, "step", [shape for work in works for shape in work.steps])
    evaluated: list[EvaluationShapes] = []
    scored = []
    generated = []
    for work in works:
        rows = work.few_shot if entry.answers == "examples" else work.test
        if rows is None:
            raise ValueError(
                f"the task has too few training rows for {recipe.shots} examples in a prompt: lower shots"
            )
        evaluated.append(rows)
        scored += [work.validation, *work.search, *rows.rows, *rows.options]
        generated += [shape._replace(target=work.new_tokens) for shape in rows.rows]
    loss = interpolated(run, "loss", scored)
    answers = interpolated(run, "answers", generated)
    ranking = _ranking(run)
    rank_modules = None
    if ranking is not None:
        searched = [shape for work in works for shape in work.search]
        rank_modules = interpolated(ranking, "step", searched)

    def cost(work: Workload, rows: EvaluationShapes) -> Cost:
        generations = [
            answers(shape._replace(target=work.new_tokens)) for shape in rows.rows
        ]
        losses = [loss(shape) for shape in (*rows.rows, *rows.options)]
        programs = [*generations, *map(loss, rows.options)]
        needed = [program.bytes for program in programs]
        state = 0
        if entry.learns == "trained":
            steps = [step(shape) for shape in work.steps]
            state = seeds * _bytes(run.state)
            # The new state of seeds in turn does not overwrite the old one.
            copied = state if run.seeds < seeds else 0
            training = sum(program.flops for program in steps)
            training += work.epochs * loss(work.validation).flops
            needed += [program.bytes + copied for program in steps]
            if ranking is not None and rank_modules is not None:
                passes = [rank_modules(shape) for shape in work.search]
                training += sum(program.flops for program in passes)
                is_whole = basis_of(ranking.recipe) != basis_of(recipe)
                pool_bytes = ranking.frozen_bytes[1] if is_whole else 0
                needed += [program.bytes + pool_bytes for program in passes]
        else:
            passes = [loss(shape) for shape in work.search]
            evaluations = entry.evaluations(recipe, modules_of(recipe))
            training = evaluations * sum(program.flops for program in passes)
            if entry.learns == "searched":
                needed += [program.bytes for program in passes]
        largest = work.search if entry.learns in ("trained", "searched") else rows.rows
        activations = round(max(needed))
        return Cost(
            trainable=trainable,
            forward_flops=max(loss(shape).flops for shape in largest),
            training_flops=training,
            # Each of these programs reads the source.
            evaluation_flops=sum(program.flops for program in (*generations, *losses)),
            weights_bytes=weights,
            pool_bytes=pool,
            state_bytes=state,
            activation_bytes=activations,
            peak_bytes=weights + pool + state + activations,
        )

    return [cost(work, rows) for work, rows in zip(works, evaluated, strict=True)]


def seeds_of(method: str, settings: Settings) -> int:
    """Return the number of seeds of a method: one if it draws nothing."""
    return settings.seeds if _of(method, settings)[0].seeded else 1


def trained_numbers(config: Architecture, method: str, settings: Settings) -> int:
    """Return the number of parameters that a method trains or searches for one seed."""
    entry, recipe = _of(method, settings)
    modules = settings.fused(recipe)
    return sum(trainable_count(entry, config, recipe, modules).values())


def _of(method: str, settings: Settings) -> tuple[MethodEntry, Any]:
    """Return a method by its name, and its recipe."""
    entry = find(method)
    return entry, recipe_of(entry.recipe, vars(settings.recipe))


def _ranking(run: Traced) -> Traced | None:
    """Return the method that ranks all modules in memory, whole or in a basis; None without such a pass."""
    if choice_of(run.recipe) == "draw" or "coefficients" not in run.entry.groups:
        return None
    in_basis = choice_of(run.recipe) != "gradient"
    changes = {
        "modules": run.settings.fused(run.recipe).pool,
        "basis": basis_of(run.recipe) if in_basis else None,
    }
    recipe = recipe_of(run.entry.recipe, vars(run.recipe) | changes)
    return dataclasses.replace(run, recipe=recipe)


def _tracing_for(device: Device) -> AbstractContextManager[None]:
    """Return a context in which functions are traced for a kind of device."""
    return use_abstract_mesh(
        AbstractMesh((), (), abstract_device=AbstractDevice(device, 1, device))
    )


def _batch(shape: Shape) -> Batch:
    """Return a batch of a shape."""
    source = (shape.rows, shape.source)
    target = (shape.rows, shape.target)
    rows = sum(count for count, *_ in shape.groups) or shape.rows
    batch = Batch(
        input_ids=jax.ShapeDtypeStruct(source, jnp.int32),
        input_mask=jax.ShapeDtypeStruct(source, jnp.bool_),
        labels=jax.ShapeDtypeStruct(target, jnp.int32),
        row_mask=jax.ShapeDtypeStruct((rows,), jnp.bool_),
    )
    if not shape.groups:
        return batch
    sources = tuple(
        jax.ShapeDtypeStruct((count, width), jnp.int32)
        for count, width, _ in shape.groups
    )
    targets = tuple(
        jax.ShapeDtypeStruct((count, width), jnp.int32)
        for count, _, width in shape.groups
    )
    return batch._replace(rows=Rows(sources, targets, batch.labels))


def _bytes(tree: Any) -> int:
    """Return the bytes of a tree of shapes."""
    return sum(
        leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(tree)
    )
