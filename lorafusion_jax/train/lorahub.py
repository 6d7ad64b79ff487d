"""LoraHub's search: one weight for every module, found by evaluating the loss, without a gradient.

The composition is `mix` with one coefficient a module, A' = sum_n w_n A_n, B' = sum_n w_n B_n. nevergrad proposes
weights within +-1.5, starting from zeros, and is told

    (sum over batches of the mean cross-entropy) / rows + 0.05 mean |w|

Source: Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", and its code.

Axis letters: N modules of a seed.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..tasks import Batch
from .methods import Frozen, Fusion
from .step import objective
from .sweep import Path, over_seeds

METHOD = Fusion(composition="mix", granularity="global", magnitudes=False)
BOUND = 1.5
L1 = 0.05


class Search(NamedTuple):
    """What a search did, for all seeds.

    Attributes:
      weights: what the optimiser recommends in the end.
      tried: the weights that it proposed, in order.
      scores: the objective at each of them.
    """

    weights: Float[np.ndarray, "seeds N"]
    tried: Float[np.ndarray, "evaluations seeds N"]
    scores: Float[np.ndarray, "evaluations seeds"]


def search(
    batches: Sequence[Batch],
    index: Int[Array, "seeds N"],
    frozen: Frozen,
    seeds: Sequence[int],
    *,
    graph: nnx.GraphDef,
    path: Path,
    evaluations: int = 40,
    after_evaluation: Callable[[int, np.ndarray], None] = lambda number, scores: None,
) -> Search:
    """Search the weights of all seeds side by side: every evaluation is one program for all of them.

    Args:
      batches: of every seed's rows, leaves with a leading axis of seeds.
      index: the modules of each seed.
      frozen: the base model and the pool.
      seeds: of the optimisers, one for each row of `index`.
      graph: the model's structure.
      path: how seeds run.
      evaluations: of the objective.
      after_evaluation: called with the number of the evaluation, from 1, and the score of every seed.

    Raises:
      ValueError: nevergrad is not installed, or there are no evaluations.
    """
    rows = sum(np.sum(batch.row_mask, axis=1) for batch in batches)

    def score(weights: np.ndarray) -> np.ndarray:
        entropy = sum(
            np.asarray(
                entropies(jnp.asarray(weights, jnp.float32), batch, index, frozen, graph=graph, path=path),
                float,
            )
            for batch in batches
        )
        return entropy / rows + L1 * np.mean(np.abs(weights), axis=1)

    return minimise(score, index.shape[1], seeds, evaluations=evaluations, after_evaluation=after_evaluation)


def minimise(
    score: Callable[[np.ndarray], np.ndarray],
    modules: int,
    seeds: Sequence[int],
    *,
    evaluations: int,
    after_evaluation: Callable[[int, np.ndarray], None] = lambda number, scores: None,
) -> Search:
    """Let one NGOpt of nevergrad for each seed propose weights until all evaluations are used up.

    Args:
      score: of weights [seeds, N], the objective of every seed.
      modules: N.
      seeds: of the optimisers.
      evaluations: how often `score` is called.
      after_evaluation: as in `search`.

    Raises:
      ValueError: nevergrad is not installed, or there are no evaluations.
    """
    if evaluations < 1:
        raise ValueError(f"{evaluations} evaluations: a search needs at least one")
    nevergrad = load_nevergrad()
    tried, scores = [], []
    with warnings.catch_warnings():
        # SciPy's and nevergrad's own, about the budget; raised in threads that nevergrad starts.
        warnings.filterwarnings("ignore", module="scipy|nevergrad|cma|sklearn")
        warnings.filterwarnings("ignore", category=nevergrad.errors.NevergradWarning)
        optimisers = [_optimiser(nevergrad, modules, evaluations, seed) for seed in seeds]
        for number in range(1, evaluations + 1):
            asked = [optimiser.ask() for optimiser in optimisers]
            tried.append(np.stack([candidate.value for candidate in asked]))
            scores.append(np.asarray(score(tried[-1]), float))
            for optimiser, candidate, value in zip(optimisers, asked, scores[-1], strict=True):
                optimiser.tell(candidate, float(value))
            after_evaluation(number, scores[-1])
        weights = np.stack([optimiser.provide_recommendation().value for optimiser in optimisers])
    return Search(weights, np.stack(tried), np.stack(scores))


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


@partial(jax.jit, static_argnames=("graph", "path"))
def entropies(
    weights: Float[Array, "seeds N"],
    batch: Batch,
    index: Int[Array, "seeds N"],
    frozen: Frozen,
    *,
    graph: nnx.GraphDef,
    path: Path,
) -> Float[Array, " seeds"]:
    """Return every seed's mean cross-entropy on its own batch, its modules mixed with its weights."""

    def of_seed(seed: tuple[Array, Batch, Array], frozen: Frozen) -> Array:
        weights, batch, index = seed
        zero = jnp.float32(0)
        params = {"coefficients": weights}
        return objective(params, batch, index, frozen, zero, graph=graph, method=METHOD)[1]["cross_entropy"]

    return over_seeds(of_seed, path)((weights, batch, index), frozen)


def _optimiser(nevergrad: ModuleType, modules: int, evaluations: int, seed: int):
    weights = nevergrad.p.Array(init=np.zeros(modules), lower=-BOUND, upper=BOUND)
    weights.random_state = np.random.RandomState(seed)
    return nevergrad.optimizers.NGOpt(parametrization=weights, budget=evaluations)
