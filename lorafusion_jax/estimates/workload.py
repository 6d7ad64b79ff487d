"""The padded batches of every run of a task, by the same rules as in training and evaluation."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from .. import tasks
from ..methods.base_alone import FewShotRecipe
from ..models.architecture import Parts
from ..tasks.packing import FEWEST_TOKENS
from ..training.recipe import Recipe

# Approximate characters per token of English with a vocabulary of 32,000; only used without a tokenizer.
CHARACTERS_PER_TOKEN = 4
_SEED = 1


class Shape(NamedTuple):
    """Shape of a batch: B rows of S source and T target tokens.

    A packed batch is one row. Attention computes it as the `groups`: a number of rows, and their S and T.
    """

    rows: int
    source: int
    target: int
    groups: tuple[tuple[int, int, int], ...] = ()

    def tokens(self, reads: Parts) -> int:
        """Return the number of tokens in these parts of all rows."""
        return self.rows * sum(getattr(self, part) for part in reads)


Shapes = tuple[Shape, ...]


class EvaluationShapes(NamedTuple):
    """Batches of an evaluation: the test rows, and each row with each of its options, if it has any."""

    rows: Shapes
    options: Shapes = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Batches that one seed computes on one task."""

    steps: Shapes  # the batch of every training step
    search: Shapes  # the batches of one evaluation of a search, which hold every training row once
    validation: Shape  # the batch at the end of every epoch
    epochs: int
    test: EvaluationShapes  # batches of evaluation
    few_shot: (
        EvaluationShapes | None
    )  # the same with examples in every prompt; None if there are too few rows for that
    new_tokens: int  # limit of generated tokens for a row
    lengths: Literal[
        "tokenised", "estimated from characters"
    ]  # source of the token lengths


def workload(
    task: tasks.Task,
    recipe: Recipe,
    *,
    tokenizer: Any = None,
    text_format: tasks.TextFormat = tasks.SEPARATE_TEXTS,
    packing: tasks.Packing | None = None,
    train_rows: int = 100,
    test_rows: int | None = None,
    eval_batch: int = 64,
) -> Workload:
    """Return the workload of a seed on a task; other seeds have the same rows in other orders.

    Without the base model's tokenizer, lengths are estimated from characters, and without `packing` all batches are
    padded. A recipe without few-shot prompts counts as one with the default number of examples.
    """
    task = dataclasses.replace(task, test=task.test[:test_rows])
    if not task.test:
        raise ValueError(f"{task.name} has no test rows: give at least one")
    train = _encode(task.train, tokenizer, text_format)
    rows = tasks.split(
        len(task.train), (_SEED,), protocol=recipe.protocol, limit=train_rows
    )
    shuffle = None if recipe.protocol == "reference" else (_SEED,)
    orders = {
        "steps": tasks.batch_orders(
            rows.train,
            batch_size=recipe.batch_size,
            epochs=recipe.epochs,
            seeds=shuffle,
        ),
        "search": tasks.batch_orders(rows.train, batch_size=recipe.batch_size),
        "validation": tasks.batch_orders(
            rows.validation, batch_size=rows.validation.shape[1]
        ),
    }
    rules: dict[str, tasks.Packing] = {}
    if packing is not None and recipe.pack:
        rules = {"steps": packing, "validation": packing.repeated(recipe.epochs)}
    shapes = {
        name: _shapes(
            tasks.train_batches(train, order, pad_id=0, packing=rules.get(name))
        )
        for name, order in orders.items()
    }
    shots = recipe.shots if isinstance(recipe, FewShotRecipe) else FewShotRecipe.shots
    enough = shots <= min(train_rows, len(task.train))
    prompted = tasks.few_shot(task, shots, _SEED) if enough else None
    options = tasks.answer_options(task)
    longest = max(len(row) for row in train.labels)
    # Other methods need no examples in the prompt, so their length is no reason to refuse the plan.
    unlimited = dataclasses.replace(text_format, context=None)
    compile_cost = FEWEST_TOKENS
    if packing is not None:
        compile_cost = packing.evaluation_compile_cost()

    def evaluation(task: tasks.Task, text_format: tasks.TextFormat) -> EvaluationShapes:
        def shapes_of(examples: Sequence[tasks.Example]) -> Shapes:
            rows = _encode(examples, tokenizer, text_format)
            batches = tasks.eval_batches(
                rows, eval_batch, pad_id=0, compile_cost=compile_cost
            )
            return _shapes(batch for _, batch in batches)

        pairs = zip(task.test, options or (), strict=options is not None)
        answered = [
            dataclasses.replace(example, target=option)
            for example, row_options in pairs
            for option in row_options
        ]
        return EvaluationShapes(shapes_of(task.test), shapes_of(answered))

    return Workload(
        steps=shapes["steps"],
        search=shapes["search"],
        validation=shapes["validation"][0],
        epochs=recipe.epochs,
        test=evaluation(task, text_format),
        few_shot=None if prompted is None else evaluation(prompted, unlimited),
        new_tokens=recipe.max_new_tokens or tasks.most_new_tokens(longest),
        lengths="estimated from characters" if tokenizer is None else "tokenised",
    )


def _shapes(batches: Iterable[tasks.Batch]) -> Shapes:
    def shape(batch: tasks.Batch) -> Shape:
        rows, source = batch.input_ids.shape[-2:]
        return Shape(
            rows,
            source,
            batch.labels.shape[-1],
            batch.rows.groups() if batch.rows else (),
        )

    return tuple(map(shape, batches))


def _encode(
    examples: Sequence[tasks.Example], tokenizer: Any, text_format: tasks.TextFormat
) -> tasks.Encoded:
    """Return tokens; without a tokenizer, a number of them estimated from characters, and an end token."""
    if tokenizer is not None:
        return tasks.encode(tokenizer, examples, text_format)

    def stand_in(text: str) -> np.ndarray:
        return np.zeros(
            min(-(-len(text) // CHARACTERS_PER_TOKEN) + 1, tasks.LONGEST), np.int32
        )

    return tasks.Encoded(
        inputs=tuple(stand_in(example.input) for example in examples),
        labels=tuple(stand_in(example.target) for example in examples),
    )
