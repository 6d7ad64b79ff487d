"""LoraHub: one weight for every module, found by evaluations of a loss, without gradients.

The modules are mixed as A' = sum_n w_n A_n, B' = sum_n w_n B_n, and w scores

    (sum over batches of the mean cross-entropy) / rows + 0.05 mean |w|

nevergrad's NGOpt proposes weights within +-1.5, zeros first, and gets their scores.

Source: Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition" (2023), and
its code.

Axis letters: N modules of a seed.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..models.weights import reads
from ..support.checks import load_optional
from ..support.progress import progress
from ..training.loss import seed_entropies
from ..training.mesh import on_mesh, to_host
from ..training.method import SEARCH, Params
from .entry import Built, MethodEntry, PoolRecipe, SearchJob
from .fusion import Fusion, separate_modules

BOUND = 1.5
L1 = 0.05

LORAHUB = Fusion(composition="mix", granularity="global", magnitudes=False)
# The scores of weights [seeds, N], from the number of the evaluation, from 1, which determines the noise of reads.
Objective = Callable[[int, np.ndarray], np.ndarray]

_MOST_EVALUATIONS = 50  # per module; beyond, NGOpt turns from COBYLA to metamodels, which NumPy 2.4 breaks


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraHubRecipe(PoolRecipe):
    """Recipe of LoraHub's search.

    Attributes:
      evaluations: number of evaluations.
    """

    evaluations: int = 40


def search(
    objective: Objective,
    seeds: Sequence[int],
    modules: int,
    *,
    evaluations: int,
) -> Float[np.ndarray, "seeds N"]:
    """Return the recommended weights of all seeds, which are searched in parallel."""
    nevergrad = load_nevergrad()
    optimisers = []
    try:
        with warnings.catch_warnings():
            # SciPy's, about the budget; raised in threads of nevergrad's.
            warnings.filterwarnings("ignore", module="scipy|nevergrad")
            for seed in seeds:
                array = nevergrad.p.Array(
                    init=np.zeros(modules), lower=-BOUND, upper=BOUND
                )
                optimisers.append(
                    nevergrad.optimizers.NGOpt(
                        parametrization=array, budget=evaluations
                    )
                )
                optimisers[-1].parametrization.random_state = np.random.RandomState(
                    seed
                )
            for number in range(1, evaluations + 1):
                candidates = [optimiser.ask() for optimiser in optimisers]
                weights = np.stack([candidate.value for candidate in candidates])
                scores = objective(number, weights).tolist()
                for place in range(len(optimisers)):
                    optimisers[place].tell(candidates[place], scores[place])
            return np.stack(
                [optimiser.provide_recommendation().value for optimiser in optimisers]
            )
    finally:
        # Their threads end with the optimisers; alive, they would keep an interrupted Python from exiting. So the frame
        # of this function, which a traceback keeps, must not have another name for one of them.
        optimisers.clear()


def objective_of(job: SearchJob) -> Objective:
    """Return LoraHub's objective on the rows of a job."""
    batches = list(job.rows.once(job.recipe.batch_size))
    rows = np.sum([np.sum(batch.row_mask, axis=1) for batch in batches], axis=0)

    def objective(number: int, weights: np.ndarray) -> np.ndarray:
        problem = job.problem.read(SEARCH, number)
        params = on_mesh(
            {"coefficients": jnp.asarray(weights, jnp.float32)}, of_seeds=True
        )
        losses = []
        for place, batch in enumerate(batches):
            read = problem.replace(frozen=reads(problem.frozen, place))
            losses.append(
                to_host(seed_entropies(params, on_mesh(batch, of_seeds=True), read))
            )
        sizes = np.mean(np.abs(weights), axis=1)
        return np.sum(losses, axis=0, dtype=float) / rows + L1 * sizes

    return objective


load_nevergrad = partial(
    load_optional, "nevergrad", extra="lorahub", needed_by="LoraHub's search"
)


def _build(built: Built) -> Fusion:
    """Return the mix that LoraHub's weights belong to; raises a ValueError for modules that cannot be mixed."""
    assert built.pool is not None
    if built.pool.magnitude is not None:
        raise ValueError(
            "LoraHub's weights scale plain LoRAs, and weights of zero stand for the base, but a DoRA adapter has "
            "magnitudes as well: use the method fusion, coefficients, single or mean, or a pool of plain LoRAs"
        )
    LORAHUB.check(built.pool)
    evaluations = built.recipe.evaluations
    most = _MOST_EVALUATIONS * built.modules
    if evaluations > most:
        raise ValueError(
            f"expected at most {most} evaluations for {built.modules} modules, got {evaluations}"
        )
    return LORAHUB


def _search(job: SearchJob) -> tuple[Params, int]:
    count = job.recipe.evaluations
    objective = objective_of(job)
    with progress("search", count) as bar:

        def recorded(number: int, weights: np.ndarray) -> np.ndarray:
            scores = objective(number, weights)
            job.record(
                {"step": number, "seed": seed, "score": score}
                for seed, score in zip(job.seeds, scores.tolist(), strict=True)
            )
            bar.update()
            return scores

        modules = job.problem.index.shape[1]
        best = search(recorded, job.seeds, modules, evaluations=count)
    return {"coefficients": jnp.asarray(best, jnp.float32)}, count


ENTRIES = (
    MethodEntry(
        name="lorahub",
        help="search one weight for each module without gradients",
        title="LoraHub",
        build=_build,
        recipe=LoraHubRecipe,
        pool=True,
        learns="searched",
        groups=("coefficients",),
        check=load_nevergrad,
        search=_search,
        evaluations=lambda recipe, modules: recipe.evaluations,
        cost_layouts=lambda recipe, rank: {
            "LoraHub": separate_modules(recipe.modules, rank)
        },
    ),
)
