"""The training loop: epochs of fusion steps over all seeds, with checkpoints that it can resume from."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from ..support.platform import for_cpu, quick_jit
from ..support.progress import progress
from ..tasks import (
    Batch,
    StepBatch,
    TrainingRows,
    batch_orders,
    train_batches,
    train_step_batches,
)
from .loss import seed_entropies
from .mesh import on_mesh, over_seeds, to_host
from .method import VALIDATION, Method, Params
from .problem import Problem
from .recipe import Optimisation, Rates, Recipe
from .step import TrainState, end_epoch, fusion_step, init_state, prune

_INIT = 0  # purpose of a seed's key: its initial parameters


class Epoch(NamedTuple):
    """Result of one epoch, for all seeds.

    Attributes:
      number: number of the epoch, from 1.
      state: state after the epoch.
      stopped: seeds that have stopped.
      metrics: name -> [steps, seeds], metrics of the steps.
      validation_loss: loss of each seed on its validation rows, nats per token.
      first_step: number of steps before the epoch.
    """

    number: int
    state: TrainState
    stopped: Bool[np.ndarray, " seeds"]
    metrics: dict[str, np.ndarray]
    validation_loss: np.ndarray
    first_step: int


# Called with the number of an epoch, the state, and the metrics of the epoch's intervals so far, each [steps, seeds].
AfterInterval = Callable[[int, TrainState, Sequence[Mapping[str, Any]]], None]


def joined(intervals: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the metrics of several intervals, name -> [steps, seeds]."""
    return {
        name: np.concatenate([interval[name] for interval in intervals])
        for name in intervals[0]
    }


def whole_epochs() -> bool:
    """Return whether one call takes all steps of an epoch, as on accelerators, or one step, as on a CPU.

    An accelerator may take a small step faster than the host starts it. A run on a CPU can be saved after every step.
    """
    return not for_cpu()


def start(
    problem: Problem, seeds: tuple[int, ...], params: Params | None = None
) -> TrainState:
    """Return the initial state of all seeds, each with its own key; `params` as in `init_state`, leaves [seeds]."""
    params = on_mesh(params, problem.config, of_seeds=True)
    seed_numbers = on_mesh(np.array(seeds, np.uint32), of_seeds=True)
    state = _start(seed_numbers, params, problem.replace(seed_mode="batched"))
    return on_mesh(state, problem.config, of_seeds=True)


def fit(
    problem: Problem,
    rows: TrainingRows,
    state: TrainState,
    recipe: Recipe,
    seeds: tuple[int, ...],
    *,
    rates: Rates | None = None,
    first_step: int = 0,
    after_interval: AfterInterval = lambda epoch, state, metrics: None,
    after_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> TrainState:
    """Train all seeds, and return their last state; the result is in `state.best`, without validation rows in `params`.

    Args:
      problem: problem of all seeds.
      rows: rows of the task.
      state: state to continue from, at the start of training or after any step.
      recipe: recipe of the training.
      seeds: seeds that order the rows.
      rates: learning rates of every seed, leaves [seeds]; None for the recipe's own.
      first_step: number of steps before `state`.
      after_interval: called with an epoch's number, the state and the metrics of the epoch's intervals so far, after
        each interval (see `whole_epochs`) but its last.
      after_epoch: called with the result of each epoch, to log and to save.
    """
    orders = orders_of(rows, recipe, seeds)
    per_epoch = orders.shape[1] // recipe.epochs
    # The number of steps is an argument of the program, so that trainings of other lengths share it. With the rows of
    # another task, a seed may have fewer than other seeds.
    schedule_steps = np.sum(np.any(orders >= 0, axis=2), axis=1, dtype=np.float32)
    schedule_steps = on_mesh(schedule_steps, of_seeds=True)
    optimisation = recipe.optimisation(0)
    # All validation rows in one batch: its loss is then their mean per token.
    validating = rows.split.validation
    packing = rows.packing if recipe.pack else None
    held_out = None
    if validating.size:
        order = batch_orders(validating, batch_size=validating.shape[1])
        all_epochs = None if packing is None else packing.repeated(recipe.epochs)
        held_out = next(
            train_batches(rows.tokens, order, pad_id=rows.pad_id, packing=all_epochs)
        )
        held_out = on_mesh(held_out, of_seeds=True)
    rates = on_mesh(
        rates or recipe_rates(problem.method, recipe, len(seeds)), of_seeds=True
    )
    if "base" not in state.params:  # otherwise those of a seed replace the frozen ones
        problem = problem.per_layer()
    length = per_epoch if whole_epochs() else 1
    steps_of_seeds = train_step_batches(
        rows.tokens,
        orders,
        pad_id=rows.pad_id,
        packing=packing,
        length=length,
        first_step=first_step,
        alike=problem.seed_mode == "batched",
    )
    intervals = map(_placed, steps_of_seeds)
    following = next(intervals, None)
    with progress("train", orders.shape[1], first_step) as bar:
        for number in range(first_step // per_epoch + 1, recipe.epochs + 1):
            metrics = []
            left = number * per_epoch - first_step
            while left and following is not None:
                batches, shapes, shape_of = following
                state, interval_metrics = train_seeds(
                    state,
                    batches,
                    problem,
                    rates,
                    shape_of,
                    schedule_steps,
                    optimisation=optimisation,
                    shapes=shapes,
                )
                following = next(
                    intervals, None
                )  # is put on the device while this one runs
                metrics.append(interval_metrics)
                if not whole_epochs():  # otherwise JAX runs up to 32 steps ahead, and a stop would wait for them
                    jax.block_until_ready(interval_metrics)
                steps = batches.row_mask.shape[1]
                left -= steps
                bar.update(steps)
                if left:
                    after_interval(number, state, metrics)
            validation_loss = np.zeros(len(seeds), np.float32)
            if held_out is not None:
                validation_loss = seed_entropies(
                    state.params, held_out, problem.read(VALIDATION, number)
                )
            state = _after_epoch(
                state,
                validation_loss,
                np.int32(number),
                optimisation=optimisation,
                pruning=optimisation.prune > 0 and number == (recipe.epochs + 1) // 2,
            )
            metrics, validation_loss, stopped = to_host(
                (metrics, validation_loss, state.stopped)
            )
            after_epoch(
                Epoch(
                    number=number,
                    state=state,
                    stopped=stopped,
                    metrics=joined(metrics),
                    validation_loss=validation_loss,
                    first_step=first_step,
                )
            )
            if np.all(stopped):
                break
            first_step = number * per_epoch
    return state


def orders_of(
    rows: TrainingRows, recipe: Recipe, seeds: tuple[int, ...]
) -> Int32[np.ndarray, "seeds steps B"]:
    """Return the rows of every step of a training."""
    shuffle = None if recipe.protocol == "reference" else seeds
    return batch_orders(
        rows.split.train,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        seeds=shuffle,
    )


@partial(
    quick_jit, static_argnames=("optimisation", "shapes"), donate_argnames=("state",)
)
def train_seeds(
    state: TrainState,
    batches: Batch,
    problem: Problem,
    rates: Rates,
    shape_of: Int[Array, "*seeds steps"] | None = None,
    schedule_steps: Float[Array, " seeds"] | None = None,
    *,
    optimisation: Optimisation,
    shapes: tuple[tuple[int, ...], ...] = (),
) -> tuple[TrainState, dict[str, Array]]:
    """Take the fusion steps of an interval with every seed, each on its own batches and at its own rates.

    Leaves of `batches` are [seeds, steps, B, ...]; `shape_of` and `shapes` are those of `StepBatch`, `schedule_steps`
    is the `steps` of `fusion_step`, whose metrics are [steps, seeds].
    """

    def in_shape(
        number: Array | None, step: Callable[[Batch], Any], batch: Batch
    ) -> Any:
        if number is None:
            return step(batch)
        steps = [lambda batch, shape=shape: step(batch.cut(*shape)) for shape in shapes]
        return jax.lax.switch(number, steps, batch)

    def train_seed(
        problem_of_seed: Problem,
        state: TrainState,
        batch: Batch,
        rates: Rates,
        steps: Array | None,
        number: Array | None,
    ) -> tuple[TrainState, dict[str, Array]]:
        return in_shape(
            number,
            lambda batch: fusion_step(
                state,
                batch,
                problem_of_seed,
                rates,
                steps,
                optimisation=optimisation,
            ),
            batch,
        )

    def step(
        state: TrainState, step_inputs: tuple[Batch, Array | None]
    ) -> tuple[TrainState, dict[str, Array]]:
        batch, number = step_inputs
        batch_numbers, shared = (
            (None, number) if number is None or number.ndim == 0 else (number, None)
        )
        return in_shape(
            shared,
            lambda batch: problem.over_seeds(
                train_seed, (state, batch, rates, schedule_steps, batch_numbers)
            ),
            batch,
        )

    step_batches = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), batches)
    return jax.lax.scan(
        step,
        state,
        (step_batches, None if shape_of is None else jnp.moveaxis(shape_of, -1, 0)),
    )


@jax.jit
def _start(seeds: Array, params: Params | None, problem: Problem) -> TrainState:
    def of_seed(
        problem_of_seed: Problem, seed: Array, params: Params | None
    ) -> TrainState:
        return init_state(
            problem_of_seed, jax.random.fold_in(jax.random.key(seed), _INIT), params
        )

    return problem.over_seeds(of_seed, (seeds, params))


@partial(jax.jit, static_argnames=("optimisation", "pruning"))
def _after_epoch(
    state: TrainState,
    loss: Array,
    number: Array,
    *,
    optimisation: Optimisation,
    pruning: bool,
) -> TrainState:
    def end_of_seed(seed: tuple[TrainState, Array], number: Array) -> TrainState:
        state, loss = seed
        state = end_epoch(state, loss, number, optimisation)
        return prune(state, optimisation.prune) if pruning else state

    return over_seeds(end_of_seed, "batched")((state, loss), number)


def recipe_rates(method: Method, recipe: Recipe, seeds: int) -> Rates:
    """Return a recipe's learning rates for a method, the same for every seed."""
    return {
        group: jax.device_put(np.full(seeds, rate, np.float32))
        for group, rate in method.learning_rates(recipe).items()
    }


def _placed(interval: StepBatch) -> StepBatch:
    """Return an interval whose batches are being copied to the mesh or the accelerator."""
    batches, shapes, shape_of = interval
    batches = on_mesh(batches, of_seeds=True)
    if shape_of is not None:
        shape_of = on_mesh(shape_of, of_seeds=shape_of.ndim > 1)
    # A CPU takes NumPy's arrays at once.
    return StepBatch(
        jax.device_put(batches) if whole_epochs() else batches, shapes, shape_of
    )
