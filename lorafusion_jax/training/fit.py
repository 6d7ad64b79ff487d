"""The training loop: epochs of fusion steps over all seeds, with checkpoints that it can go on from."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from ..hardware.chips import of_seed
from ..methods.method import Frozen, Method, Params
from ..models.weights import reads
from ..runs.evaluate import VALIDATION, seed_entropies
from ..runs.options import Recipe
from ..runs.prepare import Setup
from ..tasks import Batch, batch_orders, train_batches
from .mesh import on_mesh, to_host
from .progress import progress
from .seeds import Path, over_seeds
from .step import Optimisation, Rates, TrainState, end_epoch, fusion_step, init_state, prune

_INIT = 0  # purpose of a seed's key: where its numbers start


class Epoch(NamedTuple):
    """What one epoch did, for all seeds.

    Attributes:
      number: from 1.
      state: after it.
      stopped: which seeds go on no more.
      metrics: name -> [steps, seeds], of its steps.
      validation_loss: of each seed on its own validation rows, nats per token.
      first_step: how many steps came before it.
      last: nothing comes after it: it was the last one, or every seed has stopped.
    """

    number: int
    state: TrainState
    stopped: Bool[np.ndarray, " seeds"]
    metrics: dict[str, np.ndarray]
    validation_loss: np.ndarray
    first_step: int
    last: bool


def start(setup: Setup, seeds: tuple[int, ...], params: Params | None = None) -> TrainState:
    """Return the state that all seeds start from, each with its own key.

    Args:
      setup: of the run.
      seeds: of the run.
      params: as in `init_state`, leaves [seeds].
    """
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), _INIT) for seed in seeds])
    params = on_mesh(params, setup.config, of_seeds=True)
    state = _start(on_mesh(keys, of_seeds=True), setup.index, params, setup.frozen, method=setup.method)
    return on_mesh(state, setup.config, of_seeds=True)


def fit(
    setup: Setup,
    state: TrainState,
    recipe: Recipe,
    seeds: tuple[int, ...],
    *,
    rates: Rates | None = None,
    epochs_done: int = 0,
    after_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> TrainState:
    """Train all seeds, and return their last state; `state.best` is what counts.

    Args:
      setup: of the run.
      state: to go on from.
      recipe: of the training.
      seeds: by which rows are ordered.
      rates: of every seed, leaves [seeds]; None for the recipe's own.
      epochs_done: how many epochs lie behind `state`.
      after_epoch: called with what an epoch did, to log and to save.
    """
    assert setup.split is not None
    pad_id = setup.tokenizer.pad_token_id
    shuffle = None if recipe.protocol == "reference" else seeds
    orders = batch_orders(setup.split.train, batch_size=recipe.batch_size, epochs=recipe.epochs, seeds=shuffle)
    per_epoch = orders.shape[1] // recipe.epochs
    optimisation = recipe.optimisation(orders.shape[1])
    # All validation rows in one batch: its loss is then their mean per token.
    validating = setup.split.validation
    held_out = next(train_batches(setup.train, batch_orders(validating, batch_size=validating.shape[1]), pad_id=pad_id))
    held_out = on_mesh(held_out, of_seeds=True)
    rates = on_mesh(rates or recipe_rates(recipe, len(seeds)), of_seeds=True)
    static = {"graph": setup.graph, "method": setup.method, "path": setup.path}
    first_step = epochs_done * per_epoch
    batches = train_batches(setup.train, orders, pad_id=pad_id, first_step=first_step)
    with progress("train", orders.shape[1], first_step) as bar:
        for number in range(epochs_done + 1, recipe.epochs + 1):
            steps = []
            for _ in range(per_epoch):
                batch = on_mesh(next(batches), of_seeds=True)
                state, metrics = train_seeds(
                    state, batch, setup.index, setup.frozen, rates, optimisation=optimisation, **static
                )
                steps.append(metrics)
                bar.update()
            frozen = reads(setup.frozen, VALIDATION, number)
            validation_loss = seed_entropies(state.params, held_out, setup.index, frozen, **static)
            state = _after_epoch(
                state,
                validation_loss,
                np.int32(number),
                optimisation=optimisation,
                pruning=recipe.prune > 0 and number == (recipe.epochs + 1) // 2,
            )
            steps, validation_loss, stopped = to_host((steps, validation_loss, state.stopped))
            after_epoch(
                Epoch(
                    number=number,
                    state=state,
                    stopped=stopped,
                    metrics={k: np.stack([s[k] for s in steps]) for k in steps[0]},
                    validation_loss=validation_loss,
                    first_step=(number - 1) * per_epoch,
                    last=bool(np.all(stopped)) or number == recipe.epochs,
                )
            )
            if np.all(stopped):
                break
    return state


@partial(jax.jit, static_argnames=("graph", "method", "optimisation", "path"), donate_argnames=("state",))
def train_seeds(
    state: TrainState,
    batch: Batch,
    index: Int[Array, "seeds N"],
    frozen: Frozen,
    rates: Rates,
    *,
    graph: nnx.GraphDef,
    method: Method,
    optimisation: Optimisation,
    path: Path,
) -> tuple[TrainState, dict[str, Array]]:
    """Take one fusion step with every seed, each on its own batch and at its own rates."""

    def train_seed(
        seed: tuple[Array, TrainState, Batch, Array, Rates], frozen: Frozen
    ) -> tuple[TrainState, dict[str, Array]]:
        number, state, batch, index, rates = seed
        frozen = of_seed(frozen, number)
        return fusion_step(state, batch, index, frozen, rates, graph=graph, method=method, optimisation=optimisation)

    return over_seeds(train_seed, path)((jnp.arange(index.shape[0]), state, batch, index, rates), frozen)


@partial(jax.jit, static_argnames=("method",))
def _start(keys: Array, index: Array, params: Params | None, frozen: Frozen, *, method: Method) -> TrainState:
    def start_seed(seed: tuple[Array, Array, Array, Params | None], frozen: Frozen) -> TrainState:
        number, key, index, params = seed
        return init_state(method, of_seed(frozen, number), index, key, params)

    return over_seeds(start_seed, "vmap")((jnp.arange(len(index)), keys, index, params), frozen)


@partial(jax.jit, static_argnames=("optimisation", "pruning"))
def _after_epoch(
    state: TrainState, loss: Array, number: Array, *, optimisation: Optimisation, pruning: bool
) -> TrainState:
    def end_of_seed(seed: tuple[TrainState, Array], number: Array) -> TrainState:
        state, loss = seed
        state = end_epoch(state, loss, number, optimisation)
        return prune(state, optimisation.prune) if pruning else state

    return over_seeds(end_of_seed, "vmap")((state, loss), number)


def recipe_rates(recipe: Recipe, seeds: int) -> Rates:
    """Return the recipe's rates, the same for every seed."""
    rates = {
        "coefficients": recipe.lr_coefficients,
        "magnitudes": recipe.lr_magnitudes,
        "lora": recipe.lr_lora,
        "vera": recipe.lr_vera,
        "base": recipe.lr_full,
    }

    def of_seeds(value: float) -> Array:
        return jnp.full(seeds, value, jnp.float32)

    return Rates(
        learning_rate={group: of_seeds(rate) for group, rate in rates.items()},
        l2=of_seeds(recipe.l2),
        l1=of_seeds(recipe.l1),
    )
