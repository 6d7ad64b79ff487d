"""Ideas beyond the paper: ranked modules, a start from the gradient, softmax, pruned modules, Gauss-Newton.

Each takes the options of a run and returns what it trained, and the rows that it passed through the model.

Axis letters: N adapters.
"""

import dataclasses
import functools
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _gauss_newton import Fit, rows_of_step, step_seeds
from jaxtyping import Array, Float, Int

from lorafusion_jax import FuseOptions, Fusion
from lorafusion_jax.runs.prepare import Setup, prepare
from lorafusion_jax.runs.ranking import gradients_at_zero, most_descent
from lorafusion_jax.runs.run import rows_passed
from lorafusion_jax.tasks import Batch, batch_orders, train_batches
from lorafusion_jax.training.fit import fit, start
from lorafusion_jax.training.problem import Frozen, Method, Params
from lorafusion_jax.training.recipe import Recipe
from lorafusion_jax.training.step import TrainState

By = Literal["module", "block"]


class Trained(NamedTuple):
    """Results of a method for all seeds.

    Attributes:
      setup: with the modules that it fuses.
      params: leaves with a leading axis of seeds.
      steps: taken by each seed.
      forward_rows: passed by each seed, a product J v with the rows counted like a forward pass.
      backward_rows: passed backward by each seed, counted in the same way.
      seconds: of training, all seeds together, compilation included.
    """

    setup: Setup
    params: Params
    steps: int
    forward_rows: int
    backward_rows: int
    seconds: float


@functools.lru_cache(maxsize=1)  # runs that are pruned to several sizes share one training
def plain(options: FuseOptions) -> Trained:
    """Train as `lorafusion fuse` does."""
    setup = prepare(options)
    return _train(setup, options, start(setup.problem, options.seeds), began=time.perf_counter())


def ranked(options: FuseOptions, *, keep: int, by: By) -> Trained:
    """Fuse the `keep` modules that one backward pass ranks highest, for one epoch less."""
    setup = prepare(options)
    began = time.perf_counter()
    chosen = best(_gradients(setup, options), keep, by)
    names = [[modules[i] for i in row] for modules, row in zip(setup.modules, chosen.tolist(), strict=True)]
    index = jnp.take_along_axis(setup.problem.index, jnp.asarray(chosen), axis=1)
    setup = dataclasses.replace(setup.posing(index=index), modules=tuple(map(tuple, names)))
    return _train(setup, options, start(setup.problem, options.seeds), began=began, epochs_spent=1)


def gradient_start(options: FuseOptions) -> Trained:
    """Start from the descent at zero, as long as the uniform start, for one epoch less."""
    setup = prepare(options)
    began = time.perf_counter()
    uniform = start(setup.problem, options.seeds).params["coefficients"]
    coefficients = descent_like(_gradients(setup, options), uniform)
    state = start(setup.problem, options.seeds, {"coefficients": coefficients})
    return _train(setup, options, state, began=began, epochs_spent=1)


def softmax(options: FuseOptions) -> Trained:
    """Train logits, whose softmax over the modules are the coefficients."""
    setup = prepare(options)
    assert isinstance(setup.problem.method, Fusion)
    setup = setup.posing(method=SoftmaxFusion(setup.problem.method))
    return _train(setup, options, start(setup.problem, options.seeds), began=time.perf_counter())


def pruned(options: FuseOptions, *, keep: int) -> Trained:
    """Train as `plain`, and leave out all but the `keep` modules of the largest sum |c|."""
    trained = plain(options)
    coefficients = without_smallest(trained.params["coefficients"], keep)
    return trained._replace(params=trained.params | {"coefficients": coefficients})


def gauss_newton(options: FuseOptions, *, iterations: int, damping: float) -> Trained:
    """Take as many Gauss-Newton steps as pass no more rows than `plain` does, forward and backward together."""
    setup = prepare(options)
    began = time.perf_counter()
    batch, rows = _all_rows(setup)
    per_epoch = -(-rows // min(options.recipe.batch_size, rows))
    budget = sum(rows_passed(setup, options, options.recipe.epochs * per_epoch))
    forward, backward = rows_of_step(rows, iterations)
    steps = budget // (forward + backward)
    if not steps:
        raise ValueError(
            f"epochs {options.recipe.epochs} passes {budget} rows, one step of {iterations} iterations "
            f"{forward + backward}: give more --epochs"
        )
    begin = start(setup.problem, options.seeds).params["coefficients"]
    state = Fit(begin, jnp.full(len(options.seeds), damping, jnp.float32))
    for _ in range(steps):
        state, _ = step_seeds(state, batch, setup.problem, iterations=iterations)
    params = jax.block_until_ready({"coefficients": state.coefficients})
    return Trained(setup, params, steps, steps * forward, steps * backward, time.perf_counter() - began)


def best(gradient: Float[Array, "seeds N blocks"], keep: int, by: By) -> Int[np.ndarray, "seeds keep"]:
    """Return the positions of the modules with the greatest descent, the greatest first.

    Args:
      gradient: at c = 0.
      keep: how many.
      by: `module`, the descent along one coefficient for all blocks; `block`, the sum of |gradient|, since each block's
        coefficient may have a sign of its own.
    """
    of_each = np.asarray(gradient)
    return most_descent(of_each if by == "module" else -np.abs(of_each), keep)


def descent_like(
    gradient: Float[Array, "seeds N blocks"], coefficients: Float[Array, "seeds N blocks"]
) -> Float[Array, "seeds N blocks"]:
    """Return -s * gradient, with s such that sum |c| of each seed is that of `coefficients`."""

    def size(a: Array) -> Array:
        return jnp.sum(jnp.abs(a), axis=(1, 2), keepdims=True)

    return -gradient * (size(coefficients) / size(gradient))


def without_smallest(coefficients: Float[Array, "seeds N blocks"], keep: int) -> Float[Array, "seeds N blocks"]:
    """Return the coefficients with all but the `keep` modules of greatest sum |c| at zero, which drops them."""
    size = jnp.sum(jnp.abs(coefficients), axis=2)
    rank = jnp.argsort(jnp.argsort(-size, axis=1), axis=1)
    return jnp.where((rank < keep)[:, :, None], coefficients, 0.0)


@dataclasses.dataclass(frozen=True)
class SoftmaxFusion(Method):
    """A fusion whose coefficients are the softmax, over the modules that are there, of trained logits.

    The logits are the group `coefficients`, which L1, L2 and the learning rate are applied to; they start at 0.
    """

    fusion: Fusion

    def learning_rates(self, recipe: Recipe) -> dict[str, float]:
        return self.fusion.learning_rates(recipe)

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        params = self.fusion.init(frozen, index, key)
        return params | {"coefficients": jnp.zeros_like(params["coefficients"])}

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        return self.fusion.adapters(self.mixed(params, frozen, index), frozen, index)

    def trainable(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        return self.fusion.trainable(params, frozen, index)

    def mixed(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        """Return the parameters with the coefficients in the logits' place."""
        there = self.fusion.trainable(params, frozen, index)["coefficients"]
        logits = jnp.where(there, params["coefficients"], jnp.finfo(jnp.float32).min)
        return params | {"coefficients": jax.nn.softmax(logits, axis=0)}


def _train(setup: Setup, options: FuseOptions, state: TrainState, *, began: float, epochs_spent: int = 0) -> Trained:
    """Train for the recipe's epochs, less those spent on passes over the training rows before."""
    assert setup.split is not None
    recipe = dataclasses.replace(options.recipe, epochs=options.recipe.epochs - epochs_spent)
    if recipe.epochs < 1:
        raise ValueError(f"epochs {options.recipe.epochs}, but {epochs_spent} is spent beforehand: give more")
    state = jax.block_until_ready(fit(setup.problem, setup.rows, state, recipe, options.seeds))
    steps = int(state.step[0])
    forward, backward = rows_passed(setup, options, steps)
    spent = epochs_spent * setup.split.train.shape[1]
    return Trained(setup, state.params, steps, forward + spent, backward + spent, time.perf_counter() - began)


def _gradients(setup: Setup, options: FuseOptions) -> Float[Array, "seeds N blocks"]:
    return jnp.asarray(gradients_at_zero(setup, options.seeds, batch_size=options.recipe.batch_size))


def _all_rows(setup: Setup) -> tuple[Batch, int]:
    """Return all training rows of every seed as one batch, and how many they are."""
    assert setup.split is not None
    rows = setup.split.train
    orders = batch_orders(rows, batch_size=rows.shape[1])
    return next(train_batches(setup.train, orders, pad_id=setup.tokenizer.pad_token_id)), rows.shape[1]
