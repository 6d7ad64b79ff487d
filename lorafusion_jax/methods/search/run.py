"""Searches as runs: each writes its scores to the run's metrics and returns the numbers it found."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...runs.folder import RunFolder
from ...runs.options import FuseOptions
from ...runs.prepare import Setup
from ...tasks import Batch, batch_orders, train_batches
from ...training.progress import progress
from ..method import Params
from . import cma, lorahub
from .single import single_losses

_SEARCH = 1  # purpose of a seed's key; 0 is where training starts


def evaluations(options: FuseOptions, setup: Setup) -> int:
    """Return how often a search evaluates the training rows, for each seed."""
    recipe = options.recipe
    counts = {
        "lorahub": recipe.evaluations,
        "cma": recipe.generations * recipe.population,
        "single": setup.index.shape[1],
    }
    return counts[options.method]


def _lorahub(run: RunFolder, setup: Setup, options: FuseOptions) -> tuple[Params, int]:
    count = options.recipe.evaluations
    with progress("search", count) as bar:
        found = lorahub.search(
            _batches(setup, options),
            setup.index,
            setup.frozen,
            options.seeds,
            graph=setup.graph,
            path=setup.path,
            evaluations=count,
            after_evaluation=_recorder(run, options, bar),
        )
    return {"coefficients": jnp.asarray(found.weights, jnp.float32)}, count


def _cma(run: RunFolder, setup: Setup, options: FuseOptions) -> tuple[Params, int]:
    recipe = options.recipe
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), _SEARCH) for seed in options.seeds])
    with progress("search", recipe.generations) as bar:
        found = cma.search(
            _batches(setup, options),
            setup.index,
            setup.frozen,
            keys,
            graph=setup.graph,
            path=setup.path,
            generations=recipe.generations,
            population=recipe.population,
            after_generation=_recorder(run, options, bar),
        )
    return {"coefficients": jnp.asarray(found, jnp.float32)}, recipe.generations


def _single(run: RunFolder, setup: Setup, options: FuseOptions) -> tuple[Params, int]:
    batches = _batches(setup, options)
    static = {"graph": setup.graph, "method": setup.method, "path": setup.path}
    losses = single_losses(batches, setup.index, setup.frozen, **static)
    run.append_metrics(
        {"step": n + 1, "seed": seed, "score": losses[s, n].item(), "module": setup.modules[s][n]}
        for s, seed in enumerate(options.seeds)
        for n in range(losses.shape[1])
    )
    best = np.argmin(losses, axis=1)
    return {"coefficients": jax.nn.one_hot(best, losses.shape[1])}, losses.shape[1]


SEARCHES: dict[str, Callable[[RunFolder, Setup, FuseOptions], tuple[Params, int]]] = {
    "lorahub": _lorahub,
    "cma": _cma,
    "single": _single,
}


def _batches(setup: Setup, options: FuseOptions) -> list[Batch]:
    assert setup.split is not None
    orders = batch_orders(setup.split.train, batch_size=options.recipe.batch_size)
    return list(train_batches(setup.train, orders, pad_id=setup.tokenizer.pad_token_id))


def _recorder(run: RunFolder, options: FuseOptions, bar: Any) -> Callable[[int, np.ndarray], None]:
    def record(number: int, scores: np.ndarray) -> None:
        pairs = zip(options.seeds, scores.tolist(), strict=True)
        run.append_metrics({"step": number, "seed": seed, "score": score} for seed, score in pairs)
        bar.update()

    return record
