"""Evaluation of all seeds at once: the loss of teacher forcing, and generation scored by exact match."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..linear import reads
from ..models.generate import generate
from ..tasks import Batch, eval_batches, exact_match
from .methods import Frozen, Method, Params
from .progress import progress
from .setup import Setup
from .step import objective
from .sweep import Path, over_seeds

# What arrays are read for beside training: the first of the numbers that make a read's noise.
VALIDATION, SEARCH, GENERATION, LOSS = range(4)


class Evaluation(NamedTuple):
    """What a model says to every row of a test set, for every seed.

    Attributes:
      predictions: texts, [seeds][rows].
      correct: exact match after strip, lower case and full stops removed.
      exact_match: in percent.
      loss: mean cross-entropy of the targets in nats per token.
    """

    predictions: list[list[str]]
    correct: Bool[np.ndarray, "seeds rows"]
    exact_match: Float[np.ndarray, " seeds"]
    loss: Float[np.ndarray, " seeds"]


def evaluate(setup: Setup, params: Params, index: Int[Array, "seeds N"], *, batch_size: int) -> Evaluation:
    """Evaluate the parameters of all seeds on the test rows of `setup`.

    Args:
      setup: of the run.
      params: leaves with a leading axis of seeds.
      index: the modules of each seed.
      batch_size: rows in a batch.
    """
    seeds, pad_id = index.shape[0], setup.tokenizer.pad_token_id
    rows = len(setup.test)
    tokens = np.full((seeds, rows, setup.max_new_tokens), pad_id, np.int32)
    entropy, targets = np.zeros(seeds), 0
    static = {"graph": setup.graph, "method": setup.method, "path": setup.path}
    with progress("evaluate", rows) as bar:
        for number, (numbers, batch) in enumerate(eval_batches(setup.test, batch_size, pad_id=pad_id)):
            real = numbers >= 0
            frozen = reads(setup.frozen, GENERATION, number)
            said = generate_seeds(params, index, frozen, batch, max_new_tokens=setup.max_new_tokens, **static)
            tokens[:, numbers[real]] = np.asarray(said)[:, real]
            count = int(np.sum(batch.labels >= 0))
            everyone = jax.tree.map(lambda a: np.broadcast_to(a, (seeds, *a.shape)), batch)
            frozen = reads(setup.frozen, LOSS, number)
            entropy += np.asarray(seed_entropies(params, everyone, index, frozen, **static), float) * count
            targets += count
            bar.update(int(np.sum(real)))
    texts = [setup.tokenizer.batch_decode(seed, skip_special_tokens=True) for seed in tokens]
    wanted = [example.target for example in setup.task.test[:rows]]
    scores = [exact_match(said, wanted) for said in texts]
    return Evaluation(
        predictions=texts,
        correct=np.stack([score.correct for score in scores]),
        exact_match=np.array([score.percent for score in scores]),
        loss=entropy / targets,
    )


@partial(jax.jit, static_argnames=("max_new_tokens", "graph", "method", "path"))
def generate_seeds(
    params: Params,
    index: Int[Array, "seeds N"],
    frozen: Frozen,
    batch: Batch,
    *,
    max_new_tokens: int,
    graph: nnx.GraphDef,
    method: Method,
    path: Path,
) -> Int[Array, "seeds B T"]:
    """Generate for one batch with the adapters of every seed."""

    def of_seed(seed: tuple[Array, Params, Array], shared: tuple[Frozen, Batch]) -> Array:
        (number, params, index), (frozen, batch) = seed, shared
        frozen = reads(frozen, number)
        adapters, _ = method.adapters(params, frozen, index)
        return generate(
            nnx.merge(graph, frozen.base),
            batch.input_ids,
            batch.input_mask,
            adapters,
            max_new_tokens=max_new_tokens,
            row_mask=batch.row_mask,
        )

    return over_seeds(of_seed, path)((jnp.arange(index.shape[0]), params, index), (frozen, batch))


@partial(jax.jit, static_argnames=("graph", "method", "path"))
def seed_entropies(
    params: Params,
    batch: Batch,
    index: Int[Array, "seeds N"],
    frozen: Frozen,
    *,
    graph: nnx.GraphDef,
    method: Method,
    path: Path,
) -> Float[Array, " seeds"]:
    """Return every seed's mean cross-entropy on a batch of its own, in nats per token."""

    def of_seed(seed: tuple[Array, Params, Batch, Array], frozen: Frozen) -> Array:
        number, params, batch, index = seed
        frozen, zero = reads(frozen, number), jnp.float32(0)
        return objective(params, batch, index, frozen, zero, graph=graph, method=method)[1]["cross_entropy"]

    return over_seeds(of_seed, path)((jnp.arange(index.shape[0]), params, batch, index), frozen)
