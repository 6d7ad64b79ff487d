"""LoraHub's search: one weight for every module, found by evaluating the loss, without a gradient.

nevergrad's NGOpt proposes weights within +-1.5, zeros first, and is told the objective.

Source: Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition" (2023), and
its code.

Axis letters: N modules of a seed.
"""

import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...models.weights import reads
from ...runs.evaluate import SEARCH
from ...tasks import Batch
from ...training.seeds import Path
from ..method import Frozen
from .objective import BOUND, score

_MOST_EVALUATIONS = 50  # a module; beyond, NGOpt turns from COBYLA to metamodels, which NumPy 2.4 breaks


class Search(NamedTuple):
    """What was tried, in order, and what is recommended.

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
    index: Int[Array, "seeds N"],
    frozen: Frozen,
    seeds: Sequence[int],
    *,
    graph: nnx.GraphDef,
    path: Path,
    evaluations: int = 40,
    after_evaluation: Callable[[int, np.ndarray], None] = lambda number, scores: None,
) -> Search:
    """Search the weights of all seeds side by side: every batch is one program for all of them.

    Args:
      batches: of every seed's rows, leaves with a leading axis of seeds.
      index: the modules of each seed.
      frozen: the base model and the pool.
      seeds: of the optimisers, one for each row of `index`.
      graph: the model's structure.
      path: how seeds run.
      evaluations: of the objective, at most 50 a module.
      after_evaluation: called with the number of the evaluation, from 1, and the score of every seed.

    Raises:
      ValueError: nevergrad is not installed, or so many evaluations cannot be had.
    """
    modules = index.shape[1]
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
                read = reads(frozen, SEARCH, number)
                scores.append(score(tried[-1], batches, index, read, graph=graph, path=path))
                _tell(optimisers, asked, scores[-1])
                after_evaluation(number, scores[-1])
            weights = np.stack([optimiser.provide_recommendation().value for optimiser in optimisers])
    finally:
        # Their threads end with the optimisers; alive, they would keep an interrupted Python from exiting.
        optimisers.clear()
    return Search(weights, np.stack(tried), np.stack(scores))


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
