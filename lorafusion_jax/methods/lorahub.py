"""LoraHub: one weight for every module, found by evaluations of a loss, without gradients.

The modules are mixed as A' = sum_n w_n A_n, B' = sum_n w_n B_n, and w scores

    (sum over batches of the mean cross-entropy) / rows + 0.05 mean |w|

nevergrad's NGOpt proposes weights within +-1.5, zeros first, and is told the score.

Source: Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition" (2023), and
its code.

Axis letters: N modules of a seed.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..adapters.basis import Pool
from ..checks import at_least
from ..models.weights import reads
from ..progress import progress
from ..tasks import Batch
from ..training.frozen import SEARCH
from ..training.loss import seed_entropies
from ..training.mesh import on_mesh, to_host
from ..training.method import Params
from ..training.problem import Problem
from .fused import fused
from .fusion import Fusion, cost_layout
from .method import Billed, Built, CostLayout, MethodEntry, SearchJob
from .recipes import PoolRecipe

BOUND = 1.5
L1 = 0.05

LORAHUB = Fusion(composition="mix", granularity="global", magnitudes=False)

_MOST_EVALUATIONS = 50  # a module; beyond, NGOpt turns from COBYLA to metamodels, which NumPy 2.4 breaks


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraHubRecipe(PoolRecipe):
    """Recipe of LoraHub's search.

    Attributes:
      evaluations: number of evaluations.
    """

    evaluations: int = 40

    def check(self) -> None:
        """Raise ValueError for numbers that no search can use."""
        super().check()
        at_least(1, evaluations=self.evaluations)


class Search(NamedTuple):
    """Weights that were tried, in order, and the recommended ones.

    Attributes:
      weights: the recommendation.
      tried: every proposal.
      scores: the objective there.
    """

    weights: Float[np.ndarray, "seeds N"]
    tried: Float[np.ndarray, "evaluations seeds N"]
    scores: Float[np.ndarray, "evaluations seeds"]


def search(
    batches: Sequence[Batch],
    problem: Problem,
    seeds: Sequence[int],
    *,
    evaluations: int = 40,
    after_evaluation: Callable[[int, np.ndarray], None] = lambda number, scores: None,
) -> Search:
    """Search the weights of all seeds side by side: every batch is one program for all of them.

    Args:
      batches: of every seed's rows, leaves with a leading axis of seeds.
      problem: of all seeds; its method is `LORAHUB`.
      seeds: of the optimisers, one for each row of the problem's index.
      evaluations: of the objective, at most 50 a module.
      after_evaluation: called with the number of the evaluation, from 1, and the score of every seed.

    Raises:
      ValueError: nevergrad is not installed, or so many evaluations cannot be had.
    """
    modules = problem.index.shape[1]
    check_evaluations(evaluations, modules)
    nevergrad = load_nevergrad()
    tried, scores, optimisers = [], [], []
    try:
        with warnings.catch_warnings():
            # SciPy's, about the budget; raised in threads of nevergrad's.
            warnings.filterwarnings("ignore", module="scipy|nevergrad")
            optimisers += [_optimiser(nevergrad, modules, evaluations, seed) for seed in seeds]
            for number in range(1, evaluations + 1):
                asked = [optimiser.ask() for optimiser in optimisers]
                tried.append(np.stack([candidate.value for candidate in asked]))
                scores.append(score(tried[-1], batches, problem.read(SEARCH, number)))
                _tell(optimisers, asked, scores[-1])
                after_evaluation(number, scores[-1])
            weights = np.stack([optimiser.provide_recommendation().value for optimiser in optimisers])
    finally:
        # Their threads end with the optimisers; alive, they would keep an interrupted Python from exiting.
        optimisers.clear()
    return Search(weights, np.stack(tried), np.stack(scores))


def score(
    weights: Float[np.ndarray, "seeds N"], batches: Sequence[Batch], problem: Problem
) -> Float[np.ndarray, " seeds"]:
    """Return the objective of every seed at its weights.

    Args:
      weights: of every seed's modules.
      batches: of every seed's rows, leaves with a leading axis of seeds.
      problem: of all seeds; its method is `LORAHUB`.

    Raises:
      ValueError: as `check_lorahub` does.
    """
    if problem.frozen.pool is not None:
        check_lorahub(problem.frozen.pool)
    params = on_mesh({"coefficients": jnp.asarray(weights, jnp.float32)}, of_seeds=True)
    losses = []
    for number, batch in enumerate(batches):
        read = problem.replace(frozen=reads(problem.frozen, number))
        losses.append(to_host(seed_entropies(params, on_mesh(batch, of_seeds=True), read)))
    rows = np.sum([np.sum(batch.row_mask, axis=1) for batch in batches], axis=0)
    return np.sum(losses, axis=0, dtype=float) / rows + L1 * np.mean(np.abs(weights), axis=1)


def check_lorahub(pool: Pool) -> None:
    """Raise ValueError where LoraHub's objective is not defined on the pool."""
    if pool.magnitude is not None:
        raise ValueError(
            "LoraHub's weights scale plain LoRAs, and weights of zero stand for the base, but a DoRA adapter has "
            "magnitudes as well: use the method fusion, coefficients, single or mean, or a pool of plain LoRAs"
        )


def check_evaluations(evaluations: int, modules: int) -> None:
    """Raise ValueError on a number of evaluations that a search over `modules` weights cannot have."""
    if not 1 <= evaluations <= _MOST_EVALUATIONS * modules:
        raise ValueError(
            f"{evaluations} evaluations for {modules} modules: wanted 1 to {_MOST_EVALUATIONS * modules}, that is "
            f"at most {_MOST_EVALUATIONS} a module"
        )


def load_nevergrad() -> ModuleType:
    """Return the optional dependency.

    Raises:
      ValueError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nevergrad
    except ModuleNotFoundError as error:
        raise ValueError(
            f"LoraHub's search needs {error.name}, which is not installed: pip install -e '.[lorahub]'"
        ) from error
    return nevergrad


def _optimiser(nevergrad: ModuleType, modules: int, evaluations: int, seed: int) -> Any:
    weights = nevergrad.p.Array(init=np.zeros(modules), lower=-BOUND, upper=BOUND)
    optimiser = nevergrad.optimizers.NGOpt(parametrization=weights, budget=evaluations)
    optimiser.parametrization.random_state = np.random.RandomState(seed)
    return optimiser


def _tell(optimisers: Sequence[Any], asked: Sequence[Any], scores: np.ndarray) -> None:
    for optimiser, candidate, value in zip(optimisers, asked, scores, strict=True):
        optimiser.tell(candidate, float(value))


def recorder(job: SearchJob, bar: Any) -> Callable[[int, np.ndarray], None]:
    """Return what records the score of every seed after each round of a search, and moves its bar."""

    def record(number: int, scores: np.ndarray) -> None:
        pairs = zip(job.seeds, scores.tolist(), strict=True)
        job.record({"step": number, "seed": seed, "score": score} for seed, score in pairs)
        bar.update()

    return record


def build(built: Built) -> Fusion:
    """Return what LoraHub's weights are weights of.

    Raises:
      ValueError: as `check_lorahub` and `check_mix` do.
    """
    assert built.pool is not None
    check_lorahub(built.pool)
    LORAHUB.check(built.pool)
    return LORAHUB


def _build(built: Built) -> Fusion:
    check_evaluations(built.recipe.evaluations, built.modules)
    return build(built)


def _search(job: SearchJob) -> tuple[Params, int]:
    count, batches = job.recipe.evaluations, list(job.rows.once(job.recipe.batch_size))
    with progress("search", count) as bar:
        found = search(batches, job.problem, job.seeds, evaluations=count, after_evaluation=recorder(job, bar))
    return {"coefficients": jnp.asarray(found.weights, jnp.float32)}, count


def _cost_layouts(billed: Billed) -> dict[str, CostLayout]:
    N, r = billed.recipe.modules, billed.rank
    pool = cost_layout(N, r, sum(billed.counts.values()))
    unscaled = {"macs": lambda site: N * (2 * r + site.d_out), "words": lambda site: N, "tables": lambda site: 0}
    return {"LoraHub": dataclasses.replace(pool, **unscaled)}


ENTRIES = (
    MethodEntry(
        name="lorahub",
        help="search one weight for each module without gradients",
        title="LoraHub",
        build=_build,
        recipe=LoraHubRecipe,
        update=lambda recipe, modules: fused(recipe, modules, "mix"),
        pool=True,
        learns="searched",
        groups=("coefficients",),
        check=load_nevergrad,
        search=_search,
        evaluations=lambda recipe, modules: recipe.evaluations,
        cost_layouts=_cost_layouts,
    ),
)
