"""The padded batches that a task gives to every run of it, by the same rules as training and evaluation make them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ..tasks import Batch, Encoded, Example, batch_orders, bucket, encode, eval_batches, split, train_batches
from .cost import Shape
from .options import Recipe

# English through T5's vocabulary; its own tokenizer is what counts, this stands in where there is none.
CHARACTERS_PER_TOKEN = 4

Lengths = Literal["given", "tokenised", "estimated from characters"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What one seed computes on one task.

    Attributes:
      steps: the batch of every training step.
      search: the batches that hold every training row once: an evaluation of a gradient-free search.
      validation: the batch that every epoch ends with, or None.
      epochs: how many.
      test: the batches of the test rows.
      new_tokens: the most that is generated for a row, which is what is counted.
      lengths: where token lengths come from.
    """

    steps: tuple[Shape, ...]
    search: tuple[Shape, ...]
    validation: Shape | None
    epochs: int
    test: tuple[Shape, ...]
    new_tokens: int
    lengths: Lengths


def uniform(
    *,
    train_rows: int,
    validation_rows: int,
    test_rows: int,
    source: int,
    target: int,
    new_tokens: int,
    recipe: Recipe,
    eval_batch: int = 64,
) -> Workload:
    """Return the workload of a task whose rows are all of one length.

    Args:
      train_rows: trained in an epoch.
      validation_rows: held out of training, 0 for none.
      test_rows: evaluated.
      source: tokens of an input.
      target: tokens of an answer.
      new_tokens: of generation.
      recipe: of the training.
      eval_batch: rows in a batch of evaluation.

    Raises:
      ValueError: a number below its least.
    """
    least = {"train_rows": train_rows, "test_rows": test_rows, "source": source, "target": target}
    for name, count in (least | {"new_tokens": new_tokens, "eval_batch": eval_batch}).items():
        if count < 1:
            raise ValueError(f"{name} is {count}: wanted at least 1")
    if validation_rows < 0:
        raise ValueError(f"validation_rows is {validation_rows}: wanted at least 0")
    widths = bucket(source), bucket(target)
    size = min(recipe.batch_size, train_rows)
    search = (Shape(size, *widths),) * -(-train_rows // size)
    steps = -(-test_rows // eval_batch)
    return Workload(
        steps=search * recipe.epochs,
        search=search,
        validation=Shape(validation_rows, *widths) if validation_rows else None,
        epochs=recipe.epochs,
        test=(Shape(-(-test_rows // steps), *widths),) * steps,
        new_tokens=new_tokens,
        lengths="given",
    )


def workload(
    train: Sequence[Example],
    test: Sequence[Example],
    recipe: Recipe,
    *,
    tokenizer: Any = None,
    train_rows: int = 100,
    eval_batch: int = 64,
) -> Workload:
    """Return the workload of the first seed on a task; other seeds meet other orders of the same rows.

    Args:
      train: rows that train and validate.
      test: rows to evaluate.
      recipe: of the training.
      tokenizer: the base model's; without it lengths are estimated from characters.
      train_rows: use no more rows than this.
      eval_batch: rows in a batch of evaluation.

    Raises:
      ValueError: there are no test rows, or too few to train.
    """
    if not test:
        raise ValueError("the task has no test rows: there is nothing to evaluate")
    of_train, of_test = (_encode(rows, tokenizer) for rows in (train, test))
    rows = split(len(train), (1,), protocol=recipe.protocol, limit=train_rows)
    shuffle = None if recipe.protocol == "reference" else (1,)
    orders = batch_orders(rows.train, batch_size=recipe.batch_size, epochs=recipe.epochs, seeds=shuffle)
    once = batch_orders(rows.train, batch_size=recipe.batch_size)
    held_out = batch_orders(rows.validation, batch_size=rows.validation.shape[1])
    longest = max(len(row) for row in of_train.labels)
    return Workload(
        steps=tuple(_shape(batch) for batch in train_batches(of_train, orders, pad_id=0)),
        search=tuple(_shape(batch) for batch in train_batches(of_train, once, pad_id=0)),
        validation=_shape(next(train_batches(of_train, held_out, pad_id=0))),
        epochs=recipe.epochs,
        test=tuple(_shape(batch) for _, batch in eval_batches(of_test, eval_batch, pad_id=0)),
        new_tokens=recipe.max_new_tokens or min(bucket(2 * longest), 256),
        lengths="estimated from characters" if tokenizer is None else "tokenised",
    )


def _shape(batch: Batch) -> Shape:
    return Shape(*batch.input_ids.shape[-2:], batch.labels.shape[-1])


def _encode(examples: Sequence[Example], tokenizer: Any) -> Encoded:
    """Return tokens; without a tokenizer, as many as characters suggest and one that ends the row."""
    if tokenizer is not None:
        return encode(tokenizer, examples)

    def stand_in(text: str) -> np.ndarray:
        return np.zeros(min(-(-len(text) // CHARACTERS_PER_TOKEN) + 1, 2048), np.int32)

    return Encoded(
        inputs=tuple(stand_in(example.input) for example in examples),
        labels=tuple(stand_in(example.target) for example in examples),
    )
