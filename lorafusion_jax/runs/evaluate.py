"""Evaluation of all seeds at once: generation scored by exact match, the loss of teacher forcing, options scored."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..models.weights import reads
from ..models.generate import generate
from ..tasks import Batch, Encoded, Example, encode, eval_batches, exact_match
from ..hardware.chips import of_seed
from ..training.loss import log_likelihood
from ..methods.method import Frozen, Method, Params, adapted_model
from ..training.progress import progress
from .prepare import Setup
from ..training.mesh import on_mesh, to_host
from ..training.step import batch_logits, objective
from ..training.seeds import Path, over_seeds, per_seed

# What arrays are read for beside training: the first of the numbers that make a read's noise.
VALIDATION, SEARCH, GENERATION, LOSS, OPTIONS = range(5)


class Evaluation(NamedTuple):
    """What a model says to every row of a test set, for every seed.

    Attributes:
      predictions: texts, [seeds][rows].
      correct: exact match after strip, lower case and full stops removed.
      loss: mean cross-entropy of the targets in nats per token; None where no model was asked.
      option_correct: whether the likeliest of a row's options is its target; None for a task without options.
    """

    predictions: list[list[str]]
    correct: Bool[np.ndarray, "seeds rows"]
    loss: Float[np.ndarray, " seeds"] | None
    option_correct: Bool[np.ndarray, "seeds rows"] | None

    @property
    def exact_match(self) -> Float[np.ndarray, " seeds"]:
        """In percent."""
        return 100 * self.correct.mean(axis=1)

    @property
    def option_accuracy(self) -> Float[np.ndarray, " seeds"] | None:
        """In percent."""
        return None if self.option_correct is None else 100 * self.option_correct.mean(axis=1)


def evaluate(
    setup: Setup,
    params: Params,
    index: Int[Array, "seeds N"],
    *,
    batch_size: int,
    options: Sequence[Sequence[str]] | None = None,
) -> Evaluation:
    """Evaluate the parameters of all seeds on the test rows of `setup`.

    Args:
      setup: of the run.
      params: leaves with a leading axis of seeds.
      index: the modules of each seed.
      batch_size: rows in a batch.
      options: the answers that each test row could have, to be scored; None for an open task.
    """
    seeds, pad_id = index.shape[0], setup.tokenizer.pad_token_id
    rows = len(setup.test)
    tokens = np.full((seeds, rows, setup.max_new_tokens), pad_id, np.int32)
    entropy, targets = np.zeros(seeds), 0
    static = {"graph": setup.graph, "method": setup.method, "path": setup.path}
    with progress("evaluate", rows) as bar:
        for number, (numbers, batch) in enumerate(eval_batches(setup.test, batch_size, pad_id=pad_id)):
            real = numbers >= 0
            frozen, asked = reads(setup.frozen, GENERATION, number), on_mesh(batch)
            said = generate_seeds(params, index, frozen, asked, max_new_tokens=setup.max_new_tokens, **static)
            tokens[:, numbers[real]] = to_host(said)[:, real]
            count = int(np.sum(batch.labels >= 0))
            frozen, everyone = reads(setup.frozen, LOSS, number), _for_every_seed(batch, seeds)
            entropy += to_host(seed_entropies(params, everyone, index, frozen, **static)).astype(float) * count
            targets += count
            bar.update(int(np.sum(real)))
    texts = [setup.tokenizer.batch_decode(seed, skip_special_tokens=True) for seed in tokens]
    wanted = [example.target for example in setup.task.test[:rows]]
    scores = [exact_match(said, wanted) for said in texts]
    return Evaluation(
        predictions=texts,
        correct=np.stack([score.correct for score in scores]),
        loss=entropy / targets,
        option_correct=None if options is None else _option_correct(setup, params, index, options[:rows], batch_size),
    )


def seed_rows(seeds: tuple[int, ...], found: Evaluation) -> list[dict[str, Any]]:
    """Return {seed, exact_match, option_accuracy (percent or None), loss (nats per token or None)} of every seed."""
    columns = (found.exact_match, found.option_accuracy, found.loss)
    numbers = [[None] * len(seeds) if column is None else column.tolist() for column in columns]
    # A loss that is not finite is no number that JSON could hold.
    numbers[2] = [loss if loss is None or math.isfinite(loss) else None for loss in numbers[2]]
    return [
        {"seed": seed, "exact_match": match, "option_accuracy": options, "loss": loss}
        for seed, match, options, loss in zip(seeds, *numbers, strict=True)
    ]


def _option_correct(
    setup: Setup, params: Params, index: Int[Array, "seeds N"], options: Sequence[Sequence[str]], batch_size: int
) -> Bool[np.ndarray, "seeds rows"]:
    """Return whether the option of the greatest log-likelihood is each row's target."""
    pairs = [(row, option) for row, of_row in enumerate(options) for option in of_row]
    labels = encode(setup.tokenizer, [Example(option, option) for _, option in pairs]).labels
    asked = Encoded(tuple(setup.test.inputs[row] for row, _ in pairs), labels)
    likelihoods = np.zeros((len(index), len(pairs)))
    static = {"graph": setup.graph, "method": setup.method, "path": setup.path}
    for number, (numbers, batch) in enumerate(eval_batches(asked, batch_size, pad_id=setup.tokenizer.pad_token_id)):
        real = numbers >= 0
        frozen = reads(setup.frozen, OPTIONS, number)
        everyone = _for_every_seed(batch, len(index))
        likelihoods[:, numbers[real]] = to_host(seed_likelihoods(params, everyone, index, frozen, **static))[:, real]
    ends = np.cumsum([len(of_row) for of_row in options])
    chosen = [np.argmax(part, axis=1) for part in np.split(likelihoods, ends[:-1], axis=1)]
    wanted = [example.target for example in setup.task.test[: len(options)]]
    said = [
        [of_row[int(best[seed])] for of_row, best in zip(options, chosen, strict=True)] for seed in range(len(index))
    ]
    return np.stack([exact_match(of_seed, wanted).correct for of_seed in said])


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

    def one_seed(seed: tuple[Array, Params, Array], shared: tuple[Frozen, Batch]) -> Array:
        (number, params, index), (frozen, batch) = seed, shared
        frozen = of_seed(frozen, number)
        model, adapters, _ = adapted_model(params, index, frozen, graph=graph, method=method)
        return generate(
            model,
            batch.input_ids,
            batch.input_mask,
            adapters,
            max_new_tokens=max_new_tokens,
            row_mask=batch.row_mask,
        )

    return over_seeds(one_seed, path)((jnp.arange(index.shape[0]), params, index), (frozen, batch))


@per_seed
def seed_likelihoods(
    params: Params, batch: Batch, index: Int[Array, " N"], frozen: Frozen, *, graph: nnx.GraphDef, method: Method
) -> Float[Array, " B"]:
    """Return the log-likelihood of every row of a batch, in nats."""
    logits, _ = batch_logits(params, batch, index, frozen, graph=graph, method=method)
    return log_likelihood(logits, jnp.asarray(batch.labels))


@per_seed
def seed_entropies(
    params: Params, batch: Batch, index: Int[Array, " N"], frozen: Frozen, *, graph: nnx.GraphDef, method: Method
) -> Float[Array, ""]:
    """Return the mean cross-entropy on a batch, in nats per token."""
    return objective(params, batch, index, frozen, jnp.float32(0), graph=graph, method=method)[1]["cross_entropy"]


def _for_every_seed(batch: Batch, seeds: int) -> Batch:
    return on_mesh(jax.tree.map(lambda a: np.broadcast_to(a, (seeds, *a.shape)), batch), of_seeds=True)
