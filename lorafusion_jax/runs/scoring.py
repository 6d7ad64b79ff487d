"""Evaluation of a run, depending on its method: a model, a model with examples in the prompt, or no model."""

import dataclasses

import numpy as np

from ..methods import find
from ..tasks import BETWEEN_EXAMPLES, answer_options, constant_answer, exact_match
from ..training.method import Params
from .evaluate import Evaluation, evaluate
from .options import FuseOptions
from .prepare import Setup, Texts, encode_shown, shown_to_seeds, tasks_of_seeds


def evaluate_seeds(setup: Setup, options: FuseOptions, params: Params) -> tuple[tuple[int, ...], Evaluation]:
    """Return the seeds (only the first if all answer alike) and their evaluation.

    Args:
      setup: setup of the run.
      options: options of the run.
      params: leaves with a leading axis of seeds.
    """
    method = find(options.method)
    if method.answers == "nothing":
        return options.seeds, _constant(setup, options)
    if method.answers == "examples":
        return options.seeds, _few_shot(setup, options)
    seeds = options.seeds if method.seeded else options.seeds[:1]
    asked = setup if method.seeded else setup.with_problem(index=setup.problem.index[:1])
    return seeds, evaluate(asked, params, batch_size=options.eval_batch, options=answer_options(setup.task))


def _constant(setup: Setup, options: FuseOptions) -> Evaluation:
    """Answer every row with the most common target of the rows that a seed would train on."""
    wanted = [example.target for example in setup.task.test[: len(setup.test)]]
    said = [[constant_answer(task)] * len(wanted) for task in tasks_of_seeds(setup.task, options)]
    correct = np.stack([exact_match(of_seed, wanted).correct for of_seed in said])
    return Evaluation(said, correct, loss=None, option_correct=correct if answer_options(setup.task) else None)


def _few_shot(setup: Setup, options: FuseOptions) -> Evaluation:
    """Ask the base model with examples in the prompt, which each seed draws from the rows it would train on."""
    closed = answer_options(setup.task)
    texts = Texts(setup.tokenizer, setup.text_format)
    # Behind its answer, a model that continues the prompt goes on with further examples.
    stop = BETWEEN_EXAMPLES if texts.text_format.ends and not texts.text_format.chat else None
    found = []
    for shown in shown_to_seeds(setup.task, options):
        test = encode_shown(texts, shown, len(setup.test), setup.max_new_tokens)
        asked = dataclasses.replace(setup.with_problem(index=setup.problem.index[:1]), task=shown, test=test)
        found.append(evaluate(asked, {}, batch_size=options.eval_batch, options=closed, stop=stop))
    scored = [one.option_correct for one in found if one.option_correct is not None]
    losses = [one.loss for one in found if one.loss is not None]
    return Evaluation(
        predictions=[one.predictions[0] for one in found],
        correct=np.concatenate([one.correct for one in found]),
        loss=np.concatenate(losses),
        option_correct=np.concatenate(scored) if scored else None,
    )
