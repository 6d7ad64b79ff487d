"""Evaluation of all seeds at once: generation scored by exact match, the loss of teacher forcing, options scored."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ..models.generate import GREEDY, Sampling, generate
from ..progress import progress
from ..tasks import Batch, Encoded, Task, TextFormat, decode, encode, eval_batches, exact_match
from ..training.frozen import GENERATION, LOSS, OPTIONS
from ..training.loss import seed_entropies, seed_likelihoods
from ..training.mesh import on_mesh, to_host
from ..training.method import Params
from ..training.problem import Problem
from ..training.seeds import AXIS
from .prepare import Setup


class Evaluation(NamedTuple):
    """A model's answers to every row of a test set, and their scores, for every seed.

    Attributes:
      predictions: texts, [seeds][rows].
      correct: exact match after strip, lower case and full stops removed.
      loss: mean cross-entropy of the targets in nats per token; None if no model was evaluated.
      option_correct: the likeliest of a row's options is its target; None for a task without options.
    """

    predictions: list[list[str]]
    correct: Bool[np.ndarray, "seeds rows"]
    loss: Float[np.ndarray, " seeds"] | None
    option_correct: Bool[np.ndarray, "seeds rows"] | None

    @property
    def exact_match(self) -> Float[np.ndarray, " seeds"]:
        """Share of exact matches, in percent."""
        return 100 * self.correct.mean(axis=1)

    @property
    def option_accuracy(self) -> Float[np.ndarray, " seeds"] | None:
        """Share of rows whose likeliest option is the target, in percent; None without options."""
        return None if self.option_correct is None else 100 * self.option_correct.mean(axis=1)


def evaluate(
    setup: Setup,
    params: Params,
    *,
    batch_size: int,
    options: Sequence[Sequence[str]] | None = None,
    stop: str | None = None,
) -> Evaluation:
    """Evaluate the parameters of all seeds on the test rows of `setup`.

    Args:
      setup: of the run.
      params: leaves with a leading axis of the problem's seeds.
      batch_size: rows in a batch.
      options: the answers that each test row could have, to be scored; None for an open task.
      stop: text that ends an answer, if it occurs in one.
    """
    problem, pad_id = setup.problem, setup.tokenizer.pad_token_id
    seeds = problem.index.shape[0]
    rows = len(setup.test)
    tokens = np.full((seeds, rows, setup.max_new_tokens), pad_id, np.int32)
    entropy, targets = np.zeros(seeds), 0
    with progress("evaluate", rows) as bar:
        for number, (numbers, batch) in enumerate(eval_batches(setup.test, batch_size, pad_id=pad_id)):
            real = numbers >= 0
            read, asked = problem.read(GENERATION, number), on_mesh(batch)
            said = generate_seeds(params, asked, read, max_new_tokens=setup.max_new_tokens)
            tokens[:, numbers[real]] = to_host(said)[:, real]
            count = int(np.sum(batch.labels >= 0))
            losses = seed_entropies(params, _for_every_seed(batch, seeds), problem.read(LOSS, number))
            entropy += to_host(losses).astype(float) * count
            targets += count
            bar.update(int(np.sum(real)))
    texts = [decode(setup.tokenizer, seed, setup.text_format) for seed in tokens]
    if stop is not None:
        texts = [[said.partition(stop)[0] for said in of_seed] for of_seed in texts]
    wanted = [example.target for example in setup.task.test[:rows]]
    scores = [exact_match(said, wanted) for said in texts]
    return Evaluation(
        predictions=texts,
        correct=np.stack([score.correct for score in scores]),
        loss=entropy / targets,
        option_correct=None if options is None else _option_correct(setup, params, options[:rows], batch_size),
    )


def seed_rows(seeds: tuple[int, ...], found: Evaluation) -> list[dict[str, Any]]:
    """Return {seed, exact_match, option_accuracy (percent or None), loss (nats per token or None)} of every seed."""
    columns = (found.exact_match, found.option_accuracy, found.loss)
    numbers = [[None] * len(seeds) if column is None else column.tolist() for column in columns]
    # JSON cannot hold a loss that is not finite.
    numbers[2] = [loss if loss is None or math.isfinite(loss) else None for loss in numbers[2]]
    return [
        {"seed": seed, "exact_match": match, "option_accuracy": options, "loss": loss}
        for seed, match, options, loss in zip(seeds, *numbers, strict=True)
    ]


def _option_correct(
    setup: Setup, params: Params, options: Sequence[Sequence[str]], batch_size: int
) -> Bool[np.ndarray, "seeds rows"]:
    """Return whether the option of the greatest log-likelihood is each row's target."""
    asked = with_options(setup.tokenizer, setup.task, setup.test, options, setup.text_format)
    problem, seeds = setup.problem, setup.problem.index.shape[0]
    likelihoods = np.zeros((seeds, len(asked)))
    for number, (numbers, batch) in enumerate(eval_batches(asked, batch_size, pad_id=setup.tokenizer.pad_token_id)):
        real = numbers >= 0
        found = seed_likelihoods(params, _for_every_seed(batch, seeds), problem.read(OPTIONS, number))
        likelihoods[:, numbers[real]] = to_host(found)[:, real]
    return likeliest_correct(likelihoods, options, setup.task)


def with_options(
    tokenizer: Any, task: Task, test: Encoded, options: Sequence[Sequence[str]], text_format: TextFormat
) -> Encoded:
    """Return every test row once for each of its options, which takes the place of its target.

    Args:
      tokenizer: the base model's.
      task: the texts.
      test: tokens of the test rows.
      options: of each row.
      text_format: how texts become tokens.
    """
    pairs = [(row, option) for row, of_row in enumerate(options) for option in of_row]
    examples = [dataclasses.replace(task.test[row], target=option) for row, option in pairs]
    labels = encode(tokenizer, examples, text_format).labels
    return Encoded(tuple(test.inputs[row] for row, _ in pairs), labels)


def likeliest_correct(
    likelihoods: Float[np.ndarray, "seeds pairs"], options: Sequence[Sequence[str]], task: Task
) -> Bool[np.ndarray, "seeds rows"]:
    """Return whether each test row's likeliest option is its target.

    Args:
      likelihoods: of the rows that `with_options` returns.
      options: of each row.
      task: the task.
    """
    ends = np.cumsum([len(of_row) for of_row in options])
    chosen = [np.argmax(part, axis=1) for part in np.split(likelihoods, ends[:-1], axis=1)]
    wanted = [example.target for example in task.test[: len(options)]]
    said = [
        [of_row[int(best[seed])] for of_row, best in zip(options, chosen, strict=True)]
        for seed in range(len(likelihoods))
    ]
    return np.stack([exact_match(of_seed, wanted).correct for of_seed in said])


def generate_seeds(
    params: Params,
    batch: Batch,
    problem: Problem,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    row_keys: Key[Array, " B"] | None = None,
) -> Int[Array, "seeds B T"]:
    """Generate for one batch with the adapters of every seed; `sampling` and `row_keys` are those of `generate`."""
    if "base" not in params:  # else those of a seed take the place of the frozen ones
        problem = problem.replace(frozen=problem.frozen.unstacked())
    how = {"max_new_tokens": max_new_tokens, "sampling": sampling, "row_keys": row_keys}
    return _generate_seeds(params, batch, problem, **how)


@partial(jax.jit, static_argnames=("max_new_tokens", "sampling"))
def _generate_seeds(
    params: Params,
    batch: Batch,
    problem: Problem,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    row_keys: Key[Array, " B"] | None,
) -> Int[Array, "seeds B T"]:
    def one_seed(one: Problem, params: Params, batch: Batch, row_keys: Array | None) -> Array:
        model, adapters, _ = one.adapted_model(params)
        return generate(
            model,
            batch.input_ids,
            batch.input_mask,
            adapters,
            max_new_tokens=max_new_tokens,
            row_mask=batch.row_mask,
            sampling=sampling,
            row_keys=row_keys,
            axis=AXIS if problem.seed_mode == "batched" else None,
        )

    return problem.over_seeds(one_seed, (params,), (batch, row_keys))


def _for_every_seed(batch: Batch, seeds: int) -> Batch:
    return on_mesh(jax.tree.map(lambda a: np.broadcast_to(a, (seeds, *a.shape)), batch), of_seeds=True)
