"""Evaluation of a run by what its method is: a model, a model that sees examples, or no model at all."""

import dataclasses

import numpy as np

from ..tasks import constant_answer, encode, exact_match, few_shot
from .evaluate import Evaluation, evaluate
from .methods import Params
from .options import SEEDLESS, FuseOptions
from .setup import Setup


def evaluate_seeds(setup: Setup, options: FuseOptions, params: Params) -> tuple[tuple[int, ...], Evaluation]:
    """Return the seeds that differ, the first one where all say the same, and their evaluation.

    Args:
      setup: of the run.
      options: of the run.
      params: leaves with a leading axis of seeds.
    """
    if options.method == "constant":
        return options.seeds[:1], _constant(setup)
    if options.method == "few-shot":
        return options.seeds, _few_shot(setup, options)
    seeds = options.seeds[:1] if options.method in SEEDLESS else options.seeds
    return seeds, evaluate(setup, params, setup.index[: len(seeds)], batch_size=options.eval_batch)


def _constant(setup: Setup) -> Evaluation:
    """Answer every row with the most common target of the training rows."""
    wanted = [example.target for example in setup.task.test[: len(setup.test)]]
    said = [constant_answer(setup.task)] * len(wanted)
    correct = exact_match(said, wanted).correct[None]
    return Evaluation([said], correct, loss=None, option_correct=None)


def _few_shot(setup: Setup, options: FuseOptions) -> Evaluation:
    """Ask the base model with examples in the prompt, which each seed draws for itself."""
    found = []
    for seed in options.seeds:
        task = few_shot(setup.task, options.recipe.shots, seed)
        test = encode(setup.tokenizer, task.test[: len(setup.test)])
        shown = dataclasses.replace(setup, task=task, test=test)
        found.append(evaluate(shown, {}, setup.index[:1], batch_size=options.eval_batch))
    scored = [one.option_correct for one in found if one.option_correct is not None]
    losses = [one.loss for one in found if one.loss is not None]
    return Evaluation(
        predictions=[one.predictions[0] for one in found],
        correct=np.concatenate([one.correct for one in found]),
        loss=np.concatenate(losses),
        option_correct=np.concatenate(scored) if scored else None,
    )
