"""CMA-ES on LoraHub's objective: a gradient-free search with a modern optimiser and more evaluations.

Source: Hansen, "The CMA Evolution Strategy: A Tutorial" (2016), as evosax implements it.

Axis letters: N modules of a seed.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..progress import progress
from ..tasks import Batch
from ..training.frozen import SEARCH
from ..training.mesh import on_mesh, to_host
from ..training.method import Params
from ..training.problem import Problem
from ..training.step import standard_promotion
from .fused import fused
from .lorahub import BOUND, build, recorder, score
from .method import MethodEntry, SearchJob
from .recipes import PoolRecipe

_SEARCH = 1  # purpose of a seed's key; 0 is the start of training
_DEVIATION = 0.3  # standard deviation of the first generation about zero, a fifth of the bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMARecipe(PoolRecipe):
    """Recipe of CMA-ES.

    Attributes:
      generations: number of generations.
      population: members of a generation.
    """

    generations: int = 40
    population: int = 16

    def check(self) -> None:
        """Raise ValueError for numbers that no search can use."""
        super().check()
        check_population(self.generations, self.population)


def search(
    batches: Sequence[Batch],
    problem: Problem,
    keys: Array,
    *,
    generations: int,
    population: int,
    after_generation: Callable[[int, np.ndarray], None] = lambda number, scores: None,
) -> Float[np.ndarray, "seeds N"]:
    """Return the best weights of all generations of each seed, within LoraHub's bounds.

    One program evaluates all members of all seeds' generations, as if members were further seeds.

    Args:
      batches: batches of every seed's rows, leaves with a leading axis of seeds.
      problem: problem of all seeds; its method is `lorahub.LORAHUB`.
      keys: PRNG keys of the seeds.
      generations: number of generations.
      population: members of a generation, at least 4.
      after_generation: called with its number, from 1, and the best score of every seed so far.

    Raises:
      ValueError: evosax is not installed, or the population is too small.
    """
    check_population(generations, population)
    seeds, modules = problem.index.shape
    with _promotions():
        strategy = load_evosax().CMA_ES(population_size=population, solution=jnp.zeros(modules))
        settings = strategy.default_params.replace(std_init=jnp.asarray(_DEVIATION))
        states = [strategy.init(jax.random.fold_in(key, 0), jnp.zeros(modules), settings) for key in keys]
    spread = functools.partial(jax.tree.map, lambda a: np.repeat(np.asarray(a), population, axis=0))
    members = [spread(batch) for batch in batches]
    index = jnp.asarray(np.repeat(to_host(problem.index), population, axis=0))
    of_members = problem.replace(index=on_mesh(index, of_seeds=True))
    best, best_score = np.zeros((seeds, modules)), np.full(seeds, np.inf)
    for number in range(1, generations + 1):
        # One seed at a time: in a batch, the last bits of a search, and soon all of it, depend on the other seeds.
        now = [jax.random.split(jax.random.fold_in(key, number)) for key in keys]
        with _promotions():
            drawn = [strategy.ask(key[0], state, settings) for key, state in zip(now, states, strict=True)]
        tried = np.clip(np.stack([np.asarray(generation, float) for generation, _ in drawn]), -BOUND, BOUND)
        flat = score(tried.reshape(-1, modules), members, of_members.read(SEARCH, number))
        scores = np.where(np.isfinite(flat), flat, np.inf).reshape(seeds, population)
        with _promotions():
            states = [
                strategy.tell(key[1], *(jnp.asarray(a[seed], jnp.float32) for a in (tried, scores)), state, settings)[0]
                for seed, (key, (_, state)) in enumerate(zip(now, drawn, strict=True))
            ]
        winner = np.argmin(scores, axis=1)
        found = np.take_along_axis(scores, winner[:, None], axis=1)[:, 0]
        better = found < best_score
        best[better] = tried[np.arange(seeds), winner][better]
        best_score[better] = found[better]
        after_generation(number, best_score)
    return best


def check_population(generations: int, population: int) -> None:
    """Raise ValueError for numbers of generations or members that CMA-ES cannot use."""
    if generations < 1 or population < 4:
        raise ValueError(
            f"{generations} generations of {population}: wanted at least 1 generation, and at least 4 members of it"
        )


@contextlib.contextmanager
def _promotions() -> Iterator[None]:
    """Let evosax's own arithmetic promote dtypes and ranks, which JAX's strict modes do not allow."""
    with standard_promotion(), jax.numpy_rank_promotion("allow"):
        yield


def load_evosax() -> ModuleType:
    """Return the optional dependency's algorithms.

    Raises:
      ValueError: it is not installed.
    """
    try:
        from evosax import algorithms
    except ModuleNotFoundError as error:
        raise ValueError(f"CMA-ES needs {error.name}, which is not installed: pip install -e '.[cma]'") from error
    return algorithms


def _search(job: SearchJob) -> tuple[Params, int]:
    recipe, batches = job.recipe, list(job.rows.once(job.recipe.batch_size))
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), _SEARCH) for seed in job.seeds])
    with progress("search", recipe.generations) as bar:
        found = search(
            batches,
            job.problem,
            keys,
            generations=recipe.generations,
            population=recipe.population,
            after_generation=recorder(job, bar),
        )
    return {"coefficients": jnp.asarray(found, jnp.float32)}, recipe.generations


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
