"""CMA-ES on LoraHub's objective: a gradient-free search with a modern optimiser and more evaluations.

Source: Hansen, "The CMA Evolution Strategy: A Tutorial" (2016), as evosax implements it.

Axis letters: N modules of a seed.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..support.checks import at_least, load_optional
from ..support.progress import progress
from ..training.method import Params
from ..training.step import standard_promotion
from .entry import MethodEntry, SearchJob
from .fused import fused
from .lorahub import BOUND, Objective, build, objective_of, recorder
from .recipes import PoolRecipe

_SEARCH = 1  # purpose of a seed's key; 0 is the start of training
_DEVIATION = (
    0.3  # standard deviation of the first generation about zero, a fifth of the bound
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMARecipe(PoolRecipe):
    """Recipe of CMA-ES.

    Attributes:
      generations: number of generations.
      population: members of a generation, at least 4.
    """

    generations: int = 40
    population: int = 16

    def check(self) -> None:
        super().check()
        at_least(4, population=self.population)


def search(
    objective: Objective,
    keys: Array,
    modules: int,
    *,
    generations: int,
    population: int,
    after_generation: Callable[
        [int, Float[np.ndarray, " seeds"]], None
    ] = lambda number, scores: None,
) -> Float[np.ndarray, "seeds N"]:
    """Return the best weights of N modules of all generations of each seed, within LoraHub's bounds.

    `keys` are the seeds'. The objective gets weights [seeds * population, N]. `after_generation` is called with its
    number, from 1, and the best score of every seed so far.
    """
    seeds = len(keys)
    with _promotions():
        strategy = load_evosax().CMA_ES(
            population_size=population, solution=jnp.zeros(modules)
        )
        settings = strategy.default_params.replace(std_init=jnp.asarray(_DEVIATION))
        states = [
            strategy.init(jax.random.fold_in(key, 0), jnp.zeros(modules), settings)
            for key in keys
        ]
    best = np.zeros((seeds, modules))
    best_score = np.full(seeds, np.inf)
    for number in range(1, generations + 1):
        # One seed at a time: in a batch, the last bits of a search, and soon all of it, depend on the other seeds.
        keys_of_round = [
            jax.random.split(jax.random.fold_in(key, number)) for key in keys
        ]
        with _promotions():
            asked_generations = [
                strategy.ask(key[0], state, settings)
                for key, state in zip(keys_of_round, states, strict=True)
            ]
        tried = np.clip(
            np.stack(
                [np.asarray(generation, float) for generation, _ in asked_generations]
            ),
            -BOUND,
            BOUND,
        )
        flat = objective(number, tried.reshape(-1, modules))
        scores = np.where(np.isfinite(flat), flat, np.inf).reshape(seeds, population)
        with _promotions():
            states = [
                strategy.tell(
                    key[1],
                    *(jnp.asarray(a[seed], jnp.float32) for a in (tried, scores)),
                    state,
                    settings,
                )[0]
                for seed, (key, (_, state)) in enumerate(
                    zip(keys_of_round, asked_generations, strict=True)
                )
            ]
        winner = np.argmin(scores, axis=1)
        winning = np.take_along_axis(scores, winner[:, None], axis=1)[:, 0]
        better = winning < best_score
        best[better] = tried[np.arange(seeds), winner][better]
        best_score[better] = winning[better]
        after_generation(number, best_score)
    return best


@contextlib.contextmanager
def _promotions() -> Iterator[None]:
    """Let evosax's own arithmetic promote dtypes and ranks, which JAX's strict modes do not allow."""
    with standard_promotion(), jax.numpy_rank_promotion("allow"):
        yield


load_evosax = partial(
    load_optional, "evosax.algorithms", extra="cma", needed_by="CMA-ES"
)


def _search(job: SearchJob) -> tuple[Params, int]:
    generations = job.recipe.generations
    population = job.recipe.population
    keys = jnp.stack(
        [jax.random.fold_in(jax.random.key(seed), _SEARCH) for seed in job.seeds]
    )
    with progress("search", generations) as bar:
        weights = search(
            objective_of(job, population),
            keys,
            job.problem.index.shape[1],
            generations=generations,
            population=population,
            after_generation=recorder(job, bar),
        )
    return {"coefficients": jnp.asarray(weights, jnp.float32)}, generations


ENTRIES = (
    MethodEntry(
        name="cma",
        help="search LoraHub's weights by CMA-ES",
        build=build,
        recipe=CMARecipe,
        update=lambda recipe, modules: fused(recipe, modules, "mix"),
        pool=True,
        learns="searched",
        groups=("coefficients",),
        check=load_evosax,
        search=_search,
        evaluations=lambda recipe, modules: recipe.generations * recipe.population,
        at_once=lambda recipe: recipe.population,
    ),
)
