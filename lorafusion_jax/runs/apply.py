"""Use of a fused run: `lorafusion evaluate` on another task, `lorafusion generate` on new text."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..methods import find
from ..tasks import Example, encode, eval_batches
from ..training.problem import Params
from .evaluate import generate_seeds, seed_rows
from .options import FuseOptions
from .prepare import Setup, load_fused, prepare, with_modules
from .run import load_run
from .scoring import evaluate_seeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Evaluate a fused run, on its own task or another one, and print a row for each seed.

    Example:
      lorafusion evaluate --run runs/snarks-fusion --task bbh/ruin_names.json

    Attributes:
      run: folder of the run.
      task: task to evaluate on, as in `lorafusion fuse`; by default the run's own.
      train_rows: rows of a task without parts that are left out, since they may have trained; by default as in the
        run, so give 0 to score every row of a file that the run has not seen.
      test_rows: evaluate on the first rows of the test set only.
      eval_batch: number of rows in a batch of generation.
    """

    run: Path
    task: str | None = None
    train_rows: int | None = None
    test_rows: int | None = None
    eval_batch: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Let a fused run answer new text: one line in, one line out.

    Example:
      echo "reverse then upper : a b c" | lorafusion generate --run runs/demo/NAME

    Attributes:
      run: folder of the run.
      file: text file with a line for each answer; by default standard input.
      seed: seed of the run that answers; by default its first.
      max_new_tokens: most tokens of an answer; by default as in the run.
      eval_batch: number of lines in a batch of generation.
    """

    run: Path
    file: Path | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    eval_batch: int = 64


def evaluate_run(options: EvaluateOptions) -> list[dict[str, Any]]:
    """Return the scores of every seed of a run (see `seed_rows`)."""
    return seed_rows(*evaluate_seeds(*load_to_evaluate(options)))


def load_to_evaluate(options: EvaluateOptions) -> tuple[Setup, FuseOptions, Params]:
    """Return the setup of a run, its options with those of the evaluation, and its trained numbers."""
    fused, params, config = load_run(options.run)
    if options.task is not None:
        fused = dataclasses.replace(fused, task=options.task)
    train_rows = fused.train_rows if options.train_rows is None else options.train_rows
    test_rows = options.test_rows or fused.test_rows
    fused = dataclasses.replace(fused, train_rows=train_rows, test_rows=test_rows, eval_batch=options.eval_batch)
    setup = dataclasses.replace(prepare(fused, to_train=False), max_new_tokens=config["max_new_tokens"])
    return with_modules(setup, fused, config), fused, params


def generate_lines(options: GenerateOptions) -> list[str]:
    """Return the answers of one seed of a run to the lines of a file or of standard input.

    Raises:
      ValueError: the text is empty, the run lacks the seed, or its method cannot answer new text.
    """
    text = sys.stdin.read() if options.file is None else options.file.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{options.file or 'standard input'} holds no text: give a line for each answer")
    fused, params, config = load_run(options.run)
    if find(fused.method).answers != "model":
        raise ValueError(
            f"{options.run} is of the method {fused.method}, which answers rows of its task: use `lorafusion evaluate`"
        )
    seed = fused.seeds[0] if options.seed is None else options.seed
    if seed not in fused.seeds:
        raise ValueError(f"{options.run} has no seed {seed}: it has {', '.join(map(str, fused.seeds))}")
    model = with_modules(load_fused(fused), fused, config)
    position = slice(fused.seeds.index(seed), fused.seeds.index(seed) + 1)
    prompts = [fused.prompt.replace("{input}", line) if fused.prompt else line for line in lines]
    encoded = encode(model.tokenizer, [Example(prompt, "") for prompt in prompts])
    answers = [""] * len(lines)
    for numbers, batch in eval_batches(encoded, options.eval_batch, pad_id=model.tokenizer.pad_token_id):
        tokens = generate_seeds(
            jax.tree.map(lambda p: p[position], params),
            batch,
            model.problem.replace(index=model.problem.index[position]),
            max_new_tokens=options.max_new_tokens or config["max_new_tokens"],
        )
        said = model.tokenizer.batch_decode(np.asarray(tokens)[0], skip_special_tokens=True)
        for number, answer in zip(numbers, said, strict=True):
            if number >= 0:
                answers[number] = answer
    return answers
