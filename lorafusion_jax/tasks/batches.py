"""Padded batches in few shapes, since every shape is one more program to compile.

Axis letters: B batch, S source, T target.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from .protocol import Split, batch_orders
from .tokenizer import Encoded

IGNORED = -100  # the label of a position without a target, as in Hugging Face's losses
MOST_SHAPES = 6


class Batch(NamedTuple):
    """Padded rows; with a leading axis of seeds in training.

    Attributes:
      input_ids: source tokens.
      input_mask: True where a source token is real.
      labels: target tokens, IGNORED behind their end.
      row_mask: False for rows that only fill up the batch; they have no tokens.
    """

    input_ids: Int32[Any, "*seeds B S"]
    input_mask: Bool[Any, "*seeds B S"]
    labels: Int32[Any, "*seeds B T"]
    row_mask: Bool[Any, "*seeds B"]

    def cut(self, source_width: int, target_width: int) -> "Batch":
        """Return the batch without the tokens behind these widths, which are padding."""
        return self._replace(
            input_ids=self.input_ids[..., :source_width],
            input_mask=self.input_mask[..., :source_width],
            labels=self.labels[..., :target_width],
        )


class StepBatch(NamedTuple):
    """Batches of consecutive steps in arrays of one width, for one compiled function.

    Attributes:
      batches: leaves [seeds, steps, B, ...].
      shapes: source and target widths that steps are cut to; empty where they are all as wide as the arrays.
      shape_of: the place of each step's widths in `shapes`, or None.
    """

    batches: Batch
    shapes: tuple[tuple[int, int], ...] = ()
    shape_of: Int32[np.ndarray, " steps"] | None = None


class _Table(NamedTuple):
    """All rows padded to the longest, and behind them an empty one, which row number -1 takes."""

    input_ids: Int32[np.ndarray, "rows+1 S"]
    labels: Int32[np.ndarray, "rows+1 T"]
    input_lengths: Int[np.ndarray, " rows+1"]
    label_lengths: Int[np.ndarray, " rows+1"]

    def take(self, rows: Int32[np.ndarray, "*leading B"], source_width: int, target_width: int) -> Batch:
        return Batch(
            input_ids=self.input_ids[rows, :source_width],
            input_mask=np.arange(source_width) < self.input_lengths[rows, None],
            labels=self.labels[rows, :target_width],
            row_mask=rows >= 0,
        )


def pad(sequences: Sequence[Int[np.ndarray, " _"]], pad_id: int, width: int) -> Int32[np.ndarray, "rows {width}"]:
    """Fill up every sequence to `width` with `pad_id`; raises ValueError for a longer one."""
    padded = np.full((len(sequences), width), pad_id, np.int32)
    for row, sequence in enumerate(sequences):
        if len(sequence) > width:
            raise ValueError(f"sequence {row} has {len(sequence)} tokens, which do not fit into {width}")
        padded[row, : len(sequence)] = sequence
    return padded


def bucket(length: int) -> int:
    """Return the smallest width of the ladder that holds `length` tokens.

    The ladder: 4, 8, 12, ... 64, from there eight widths an octave: 72, 80, ... 128, 144, 160, ... On BIG-Bench Hard
    70 % of the computed tokens of a training with one seed are real (`benchmarks/padding.py`).
    """
    octave = 1 << max(length - 1, 0).bit_length()
    rung = max(octave // 16, 4)
    return max(-(-length // rung), 1) * rung


def most_new_tokens(longest: int) -> int:
    """Return how many tokens are generated at most where the longest training target has `longest`: twice as many."""
    return min(bucket(2 * longest), 256)


def train_batches(encoded: Encoded, orders: Int32[np.ndarray, "seeds steps B"], *, pad_id: int) -> Iterator[Batch]:
    """Yield the batches of all seeds, step by step: `[seeds, B, width]` (see `train_step_batches`)."""
    for interval in train_step_batches(encoded, orders, pad_id=pad_id):
        yield Batch(*(leaf[:, 0] for leaf in interval.batches))


def train_step_batches(
    encoded: Encoded,
    orders: Int32[np.ndarray, "seeds steps B"],
    *,
    pad_id: int,
    length: int = 1,
    first_step: int = 0,
) -> Iterator[StepBatch]:
    """Yield the batches of all seeds, `length` steps at a time, from `first_step` on.

    The width of a step holds the longest row that any seed has in it. The widths to choose from depend on all of
    `orders` (row numbers from `batch_orders`), so a resumed run, and every interval of a run, has the same shapes.
    Every interval but the first ends `length` steps after the one before it, or with the last step.
    """
    table = _table(encoded, pad_id)
    of_step = _shapes(table.input_lengths[orders].max(axis=(0, 2)), table.label_lengths[orders].max(axis=(0, 2)))
    shapes = sorted(set(of_step))
    while first_step < orders.shape[1]:
        end = first_step - first_step % length + length
        own, rows = of_step[first_step:end], orders[:, first_step:end]
        if len(shapes) == 1 or length == 1:
            yield StepBatch(table.take(rows, *own[0]))
        else:
            batches = table.take(rows, *map(max, zip(*shapes, strict=True)))
            yield StepBatch(batches, tuple(shapes), np.array([shapes.index(shape) for shape in own], np.int32))
        first_step = end


def eval_batches(encoded: Encoded, batch_size: int, *, pad_id: int) -> Iterator[tuple[Int32[np.ndarray, " B"], Batch]]:
    """Yield row numbers and batches, shortest rows first, all of one B; every row once.

    B is the smallest that needs no more steps than `batch_size` does. Row number -1 marks a row that only
    fills up the last batch. Predictions return to the order of `encoded` by
    `result[rows[rows >= 0]] = predictions[rows >= 0]`.
    """
    count = len(encoded)
    steps = -(-count // batch_size)
    if steps == 0:
        return
    size = -(-count // steps)
    table = _table(encoded, pad_id)
    order = np.argsort(table.input_lengths[:-1], kind="stable").astype(np.int32)
    rows = np.concatenate([order, np.full(steps * size - count, -1, np.int32)]).reshape(steps, size)
    shapes = _shapes(table.input_lengths[rows].max(axis=1), table.label_lengths[rows].max(axis=1))
    for step, shape in enumerate(shapes):
        yield rows[step], table.take(rows[step], *shape)


class TrainingRows(NamedTuple):
    """Rows of a task, and those that each seed uses.

    Attributes:
      tokens: tokens of all rows.
      split: training and validation rows of each seed.
      pad_id: token that fills up a batch.
    """

    tokens: Encoded
    split: Split
    pad_id: int

    def once(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches that hold every training row of every seed once; leaves have a leading axis of seeds."""
        return train_batches(self.tokens, batch_orders(self.split.train, batch_size=batch_size), pad_id=self.pad_id)


def _table(encoded: Encoded, pad_id: int) -> _Table:
    nothing = np.zeros(0, np.int32)
    inputs, labels = (*encoded.inputs, nothing), (*encoded.labels, nothing)
    input_lengths, label_lengths = (np.array([len(row) for row in rows]) for rows in (inputs, labels))
    return _Table(
        input_ids=pad(inputs, pad_id, bucket(int(input_lengths.max()))),
        labels=pad(labels, IGNORED, bucket(int(label_lengths.max()))),
        input_lengths=input_lengths,
        label_lengths=label_lengths,
    )


def _shapes(
    longest_source: Int[np.ndarray, " steps"], longest_target: Int[np.ndarray, " steps"]
) -> list[tuple[int, int]]:
    """Choose source and target width of every batch, at most MOST_SHAPES different pairs."""
    wanted = np.array([bucket(int(length)) for length in longest_source])
    widths, batches = np.unique(wanted, return_counts=True)
    while len(widths) > MOST_SHAPES:
        # Drop the width whose batches grow least, all told, when they take the next one.
        cheapest = int(np.argmin(batches[:-1] * np.diff(widths)))
        batches[cheapest + 1] += batches[cheapest]
        widths, batches = np.delete(widths, cheapest), np.delete(batches, cheapest)
    sources = widths[np.searchsorted(widths, wanted)]
    # One target width for each source width: long answers of long questions do not widen the others.
    targets = {int(width): bucket(int(longest_target[sources == width].max())) for width in widths}
    return [(int(source), targets[int(source)]) for source in sources]
