"""Evaluation of all seeds at once: exact match of generated answers, loss of teacher forcing, and scored options."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from ..loading.model import Texts, evaluation_compile_cost
from ..support.progress import progress
from ..tasks import (
    BETWEEN_EXAMPLES,
    Encoded,
    answer_options,
    constant_answer,
    decode,
    encode,
    eval_batches,
    exact_match,
)
from ..training.loss import seed_scores
from ..training.mesh import on_mesh, to_host
from ..training.method import GENERATION, LOSS, OPTIONS, Params
from ..training.problem import Problem
from .generation import generate_rows
from .options import FuseOptions
from .setup import Setup, encode_shown, shown_to_seeds, tasks_of_seeds


class Evaluation(NamedTuple):
    """A model's answers to every row of a test set, and their scores, for every seed."""

    predictions: list[list[str]]  # texts, [seeds][rows]
    correct: Bool[
        np.ndarray, "seeds rows"
    ]  # exact match after strip, lower case and full stops removed
    # mean cross-entropy of the targets in nats per token; None if no model was evaluated
    loss: Float[np.ndarray, " seeds"] | None
    # the likeliest of a row's options is its target; None for a task without options
    option_correct: Bool[np.ndarray, "seeds rows"] | None
    # cross-entropy of each target, in nats; None if no model was evaluated
    row_losses: Float[np.ndarray, "seeds rows"] | None = None

    @property
    def exact_match(self) -> Float[np.ndarray, " seeds"] | None:
        """Share of exact matches, in percent; None without rows."""
        return 100 * self.correct.mean(axis=1) if self.correct.size else None

    @property
    def option_accuracy(self) -> Float[np.ndarray, " seeds"] | None:
        """Share of rows whose likeliest option is the target, in percent; None without options."""
        if self.option_correct is None:
            return None
        return 100 * self.option_correct.mean(axis=1)


def evaluate(
    setup: Setup,
    params: Params,
    *,
    batch_size: int,
    options: Sequence[Sequence[str]] | None = None,
    stop: str | None = None,
) -> Evaluation:
    """Evaluate the parameters of all seeds (their leading axis) on the test rows of `setup`.

    `options` are the possible answers of each test row, to be scored, and `stop` is text that ends an answer.
    """
    problem = setup.problem
    pad_id = setup.tokenizer.pad_token_id
    seeds = problem.index.shape[0]
    rows = len(setup.test)
    with progress("answers", seeds * rows) as bar:
        tokens = generate_rows(
            params,
            partial(problem.read, GENERATION),
            setup.test,
            batch_size=batch_size,
            max_new_tokens=setup.max_new_tokens,
            pad_id=pad_id,
            update=bar.update,
        )
    losses = row_losses(setup, params, batch_size=batch_size)
    texts = [decode(setup.tokenizer, seed, setup.text_format) for seed in tokens]
    if stop is not None:
        texts = [
            [text.partition(stop)[0] for text in seed_texts] for seed_texts in texts
        ]
    targets = [example.target for example in setup.task.test[:rows]]
    return Evaluation(
        predictions=texts,
        correct=exact_match(texts, targets),
        loss=losses.sum(axis=1) / sum(map(len, setup.test.labels)),
        option_correct=None
        if options is None
        else _option_correct(setup, params, options[:rows], batch_size),
        row_losses=losses,
    )


def row_losses(
    setup: Setup, params: Params, *, batch_size: int
) -> Float[np.ndarray, "seeds rows"]:
    """Return the cross-entropy of the target of each test row, in nats."""
    return -_likelihoods(setup, params, setup.test, batch_size, LOSS)


def evaluate_seeds(
    setup: Setup, options: FuseOptions, params: Params
) -> tuple[tuple[int, ...], Evaluation]:
    """Return the seeds (only the first if all answer alike) and their evaluation, depending on the method.

    A method answers with a model, with a model and examples in the prompt, or without a model.
    """
    method = options.entry
    if not len(setup.test):
        nothing = [list[str]() for _ in options.seeds]
        no_rows = np.zeros((len(options.seeds), 0), bool)
        return options.seeds, Evaluation(nothing, no_rows, None, None)
    closed = answer_options(setup.task)
    if method.answers == "nothing":
        targets = [example.target for example in setup.task.test[: len(setup.test)]]
        predictions = [
            [constant_answer(task)] * len(targets)
            for task in tasks_of_seeds(setup.task, options)
        ]
        correct = exact_match(predictions, targets)
        option_correct = correct if closed else None
        return options.seeds, Evaluation(predictions, correct, None, option_correct)
    if method.answers == "examples":
        return options.seeds, evaluate_few_shot(setup, options, closed=closed)
    seeds = options.seeds if method.seeded else options.seeds[:1]
    loaded = (
        setup if method.seeded else setup.with_problem(index=setup.problem.index[:1])
    )
    return seeds, evaluate(
        loaded,
        params,
        batch_size=options.eval_batch,
        options=closed,
    )


def evaluate_few_shot(
    setup: Setup, options: FuseOptions, *, closed: Sequence[Sequence[str]] | None
) -> Evaluation:
    """Evaluate the base model with examples in the prompt, which each seed draws from its rows.

    `closed` are the possible answers of each test row; None for a task without them.
    """
    texts = Texts(setup.tokenizer, setup.text_format)
    # After its answer, a model that continues the prompt adds further examples.
    if texts.text_format.ends and not texts.text_format.chat:
        stop = BETWEEN_EXAMPLES
    else:
        stop = None
    evaluations = []
    for shown in shown_to_seeds(setup.task, options):
        test = encode_shown(texts, shown, len(setup.test), setup.max_new_tokens)
        with_examples = dataclasses.replace(
            setup.with_problem(index=setup.problem.index[:1]), task=shown, test=test
        )
        evaluations.append(
            evaluate(
                with_examples,
                {},
                batch_size=options.eval_batch,
                options=closed,
                stop=stop,
            )
        )
    return Evaluation(
        predictions=[evaluation.predictions[0] for evaluation in evaluations],
        correct=np.concatenate([evaluation.correct for evaluation in evaluations]),
        loss=_joined([evaluation.loss for evaluation in evaluations]),
        option_correct=_joined([each.option_correct for each in evaluations]),
        row_losses=_joined([evaluation.row_losses for evaluation in evaluations]),
    )


def _joined(scores: Sequence[np.ndarray | None]) -> np.ndarray | None:
    present = [score for score in scores if score is not None]
    return np.concatenate(present) if present else None


def seed_rows(seeds: tuple[int, ...], evaluation: Evaluation) -> list[Any]:
    """Return {seed, exact_match, option_accuracy (percent or None), loss (nats per token or None)} of every seed."""
    columns = (evaluation.exact_match, evaluation.option_accuracy, evaluation.loss)
    scores = [
        [None] * len(seeds) if column is None else column.tolist() for column in columns
    ]
    # JSON cannot hold a loss that is not finite.
    scores[2] = [
        loss if loss is None or math.isfinite(loss) else None for loss in scores[2]
    ]
    return [
        {"seed": seed, "exact_match": match, "option_accuracy": options, "loss": loss}
        for seed, match, options, loss in zip(seeds, *scores, strict=True)
    ]


def _option_correct(
    setup: Setup, params: Params, options: Sequence[Sequence[str]], batch_size: int
) -> Bool[np.ndarray, "seeds rows"]:
    """Return whether the option of the greatest log-likelihood is each row's target."""
    pairs = [
        (row, option)
        for row, row_options in enumerate(options)
        for option in row_options
    ]
    examples = [
        dataclasses.replace(setup.task.test[row], target=option)
        for row, option in pairs
    ]
    labels = encode(setup.tokenizer, examples, setup.text_format).labels
    inputs = tuple(setup.test.inputs[row] for row, _ in pairs)
    likelihoods = _likelihoods(
        setup, params, Encoded(inputs, labels), batch_size, OPTIONS
    )
    ends = np.cumsum([len(row_options) for row_options in options])
    parts = np.split(likelihoods, ends[:-1], axis=1)
    likeliest: list[list[int]] = np.stack(
        [np.argmax(part, axis=1) for part in parts], axis=1
    ).tolist()
    predictions = [
        [row_options[best] for row_options, best in zip(options, seed, strict=True)]
        for seed in likeliest
    ]
    targets = [example.target for example in setup.task.test[: len(options)]]
    return exact_match(predictions, targets)


def _likelihoods(
    setup: Setup, params: Params, rows: Encoded, batch_size: int, purpose: int
) -> Float[np.ndarray, "seeds rows"]:
    """Return the log-likelihood of each row's labels, in nats; `purpose` is that of the noise of reads."""
    with progress("losses", len(rows)) as bar:
        likelihoods, _ = score_rows(
            params,
            partial(setup.problem.read, purpose),
            rows,
            batch_size=batch_size,
            pad_id=setup.tokenizer.pad_token_id,
            update=bar.update,
        )
    return likelihoods


def score_rows(
    params: Params,
    read: Callable[[int], Problem],
    rows: Encoded,
    *,
    batch_size: int,
    pad_id: int,
    update: Callable[[int], Any],
) -> tuple[Float[np.ndarray, "seeds rows"], Bool[np.ndarray, "seeds rows"]]:
    """Return the log-likelihood of each row's labels, in nats, and whether greedy generation would give them.

    Args:
      params: trained parameters, leaves with a leading axis of seeds.
      read: function from the number of a batch to the problem of all seeds, with the batch's noise.
      rows: inputs, and the labels that are scored.
      batch_size: most rows that are computed at once.
      pad_id: token that fills up rows.
      update: function that is called with numbers of rows that are scored.
    """
    problem = read(0)
    seeds = problem.index.shape[0]
    likelihoods = np.zeros((seeds, len(rows)))
    greedy = np.zeros((seeds, len(rows)), bool)
    compile_cost = evaluation_compile_cost(problem.config)
    batches = eval_batches(rows, batch_size, pad_id=pad_id, compile_cost=compile_cost)
    for number, (indices, batch) in enumerate(batches):
        if number > 0:
            problem = read(number)
        real = indices >= 0
        seed_batch = jax.tree.map(
            lambda leaf: np.broadcast_to(leaf, (seeds, *leaf.shape)), batch
        )
        seed_batch = on_mesh(seed_batch, of_seeds=True)
        scores = to_host(seed_scores(params, seed_batch, problem))
        likelihoods[:, indices[real]] = scores[0][:, real]
        greedy[:, indices[real]] = scores[1][:, real]
        update(int(np.sum(real)))
    return likelihoods, greedy
