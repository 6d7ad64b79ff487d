"""Padded and packed batches in few shapes, since every shape is one more program to compile.

Axis letters: B batch, S source, T target. In packed batches B is 1, except in `row_mask`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, Int32

from .packing import FEWEST_TOKENS, Packing, bucket, few_widths, groups
from .protocol import Split, batch_orders
from .tokenizer import Encoded

IGNORED = -100  # the label of a position without a target, as in Hugging Face's losses
NOWHERE = np.iinfo(np.int32).max


class Rows(NamedTuple):
    """The rows of a packed batch, which lie behind each other in one line. Attention takes them apart, in groups.

    The last source token of a causal model's row is not among its source tokens, only in front of its first label.

    Attributes:
      sources: for each group the places of its rows' source tokens in the line; NOWHERE behind the end of a row.
      targets: the same of its rows' labels.
      before: the token in front of each label; -1 where the model's start token is.
    """

    sources: tuple[Int32[Any, "*seeds _ _"], ...]
    targets: tuple[Int32[Any, "*seeds _ _"], ...]
    before: Int32[Any, "*seeds 1 T"]

    def groups(self) -> tuple[tuple[int, int, int], ...]:
        """Return the number of rows, and the widths of sources and targets, of each group."""
        parts = zip(self.sources, self.targets, strict=True)
        return tuple((*source.shape[-2:], target.shape[-1]) for source, target in parts)


class Batch(NamedTuple):
    """Padded or packed rows; with a leading axis of seeds in training.

    Attributes:
      input_ids: source tokens.
      input_mask: True where a source token is real.
      labels: target tokens, IGNORED behind their end.
      row_mask: False for rows that only fill up the batch; they have no tokens.
      rows: the rows of a packed batch; None if every row has its own line.
    """

    input_ids: Int32[Any, "*seeds B S"]
    input_mask: Bool[Any, "*seeds B S"]
    labels: Int32[Any, "*seeds B T"]
    row_mask: Bool[Any, "*seeds rows"]
    rows: Rows | None = None

    def cut(self, source_width: int, target_width: int, *row_widths: int) -> "Batch":
        """Return the batch without the tokens behind these widths, and those of its rows by group: they are padding."""
        rows = self.rows
        if rows is not None:
            sources = zip(rows.sources, row_widths[::2], strict=True)
            targets = zip(rows.targets, row_widths[1::2], strict=True)
            rows = Rows(
                tuple(group[..., :width] for group, width in sources),
                tuple(group[..., :width] for group, width in targets),
                rows.before[..., :target_width],
            )
        return self._replace(
            input_ids=self.input_ids[..., :source_width],
            input_mask=self.input_mask[..., :source_width],
            labels=self.labels[..., :target_width],
            rows=rows,
        )


class StepBatch(NamedTuple):
    """Batches of consecutive steps in arrays of one width, for one compiled function.

    Attributes:
      batches: leaves [seeds, steps, B, ...].
      shapes: widths that steps are cut to (see `Batch.cut`); empty where they are all as wide as the arrays.
      shape_of: the place of each step's widths in `shapes`, of each seed's own if seeds differ; or None.
    """

    batches: Batch
    shapes: tuple[tuple[int, ...], ...] = ()
    shape_of: Int32[np.ndarray, "*seeds steps"] | None = None


class _Table(NamedTuple):
    """All rows padded to the widest batch, and behind them an empty one, which row number -1 takes."""

    input_ids: Int32[np.ndarray, "rows+1 S"]
    labels: Int32[np.ndarray, "rows+1 T"]
    lengths: Int[np.ndarray, "rows+1 2"]

    def take(
        self,
        rows: Int32[np.ndarray, "*leading B"],
        source_width: int,
        target_width: int,
    ) -> Batch:
        return Batch(
            input_ids=self.input_ids[rows, :source_width],
            input_mask=np.arange(source_width) < self.lengths[rows, :1],
            labels=self.labels[rows, :target_width],
            row_mask=rows >= 0,
        )


def pad(
    sequences: Sequence[Int[np.ndarray, " _"]], pad_id: int, width: int
) -> Int32[np.ndarray, "rows {width}"]:
    """Fill up every sequence to `width` with `pad_id`; raises ValueError for a longer one."""
    padded = np.full((len(sequences), width), pad_id, np.int32)
    for row, sequence in enumerate(sequences):
        if len(sequence) > width:
            raise ValueError(
                f"sequence {row} has {len(sequence)} tokens: expected at most {width}"
            )
        padded[row, : len(sequence)] = sequence
    return padded


def most_new_tokens(longest: int) -> int:
    """Return how many tokens are generated at most where the longest training target has `longest`: twice as many."""
    return min(bucket(2 * longest), 256)


def train_batches(
    encoded: Encoded,
    orders: Int32[np.ndarray, "seeds steps B"],
    *,
    pad_id: int,
    packing: Packing | None = None,
) -> Iterator[Batch]:
    """Yield the batches of all seeds, step by step: `[seeds, B, width]` (see `train_step_batches`)."""
    for step in train_step_batches(encoded, orders, pad_id=pad_id, packing=packing):
        yield jax.tree.map(lambda array: array[:, 0], step.batches)


def train_step_batches(
    encoded: Encoded,
    orders: Int32[np.ndarray, "seeds steps B"],
    *,
    pad_id: int,
    length: int = 1,
    first_step: int = 0,
    packing: Packing | None = None,
    alike: bool = True,
) -> Iterator[StepBatch]:
    """Yield the batches of all seeds, `length` steps at a time, from `first_step` on.

    The width of a step holds the longest row that any seed has in it, or with `packing` all its rows; only packed
    batches of seeds that need not be `alike` differ in width. The widths to choose from depend on all of
    `orders` (row indices from `batch_orders`), so a resumed run, and every interval of a run, has the same shapes.
    Every interval but the first ends `length` steps after the one before it, or with the last step.
    """
    table = _table(encoded, pad_id)
    batch_widths = step_widths(encoded, orders, packing, alike=alike)

    def take(steps: slice, *widths: int) -> Batch:
        if packing is None or len(widths) == 2:
            return table.take(orders[:, steps], *widths)
        return _packed(
            encoded, orders[:, steps], widths, pad_id=pad_id, causal=packing.causal
        )

    different, number = np.unique(
        batch_widths.reshape(-1, batch_widths.shape[-1]), axis=0, return_inverse=True
    )
    shapes = tuple(map(tuple, different.tolist()))
    shape_of = number.reshape(batch_widths.shape[:-1]).astype(np.int32)
    while first_step < orders.shape[1]:
        steps = slice(first_step, first_step - first_step % length + length)
        shape_numbers = shape_of[..., steps]
        if len(shapes) == 1 or (length == 1 and shape_numbers.size == 1):
            yield StepBatch(take(steps, *shapes[shape_numbers.flat[0]]))
        else:
            yield StepBatch(take(steps, *map(max, *shapes)), shapes, shape_numbers)
        first_step = steps.stop


def step_widths(
    encoded: Encoded,
    orders: Int32[np.ndarray, "seeds steps B"],
    packing: Packing | None,
    *,
    alike: bool,
) -> Int[np.ndarray, "*seeds steps widths"]:
    """Return the widths of all steps: those of `Packing.plan`, or the source and target width of padded rows."""
    lengths = _lengths(encoded)[orders]
    longest = lengths.max(axis=(0, 2))
    padded = few_widths(longest, lambda count, source, _: count * source)
    planned = None if packing is None else packing.plan(lengths, padded, alike=alike)
    return padded if planned is None else planned


def eval_batches(
    encoded: Encoded,
    batch_size: int,
    *,
    pad_id: int,
    compile_cost: float = FEWEST_TOKENS,
) -> Iterator[tuple[Int32[np.ndarray, " B"], Batch]]:
    """Yield row indices and batches, shortest rows first, in few groups of one shape; every row once.

    One more shape must save `compile_cost` tokens (see `Packing.evaluation_compile_cost`).

    B of a group is the smallest that needs no more steps than `batch_size` does. Row number -1 marks a row that only
    fills up a group's last batch. Predictions return to the order of `encoded` by
    `result[rows[rows >= 0]] = predictions[rows >= 0]`.
    """
    if not len(encoded):
        return
    table = _table(encoded, pad_id)

    def computed(count: Any, source: Any, target: Any) -> Any:
        steps = -(-count // batch_size)
        return steps * -(-count // steps) * (source + target)

    order = np.argsort(table.lengths[:-1, 0], kind="stable").astype(np.int32)
    row_widths = few_widths(table.lengths[order], computed, compile_cost=compile_cost)
    for shape in np.unique(row_widths, axis=0).tolist():
        rows = order[(row_widths == shape).all(axis=1)]
        steps = -(-len(rows) // batch_size)
        filling = np.full(-len(rows) % steps, -1, np.int32)
        for indices in np.concatenate([rows, filling]).reshape(steps, -1):
            yield indices, table.take(indices, *shape)


class TrainingRows(NamedTuple):
    """Rows of a task, and those that each seed uses.

    Attributes:
      tokens: tokens of all rows.
      split: training and validation rows of each seed.
      pad_id: token that fills up a batch.
      packing: rule for packed batches; None for padded ones.
    """

    tokens: Encoded
    split: Split
    pad_id: int
    packing: Packing | None = None

    def once(self, batch_size: int) -> Iterator[Batch]:
        """Yield padded batches that hold every training row of every seed once; leaves have a leading axis of seeds."""
        return train_batches(
            self.tokens,
            batch_orders(self.split.train, batch_size=batch_size),
            pad_id=self.pad_id,
        )

    def followed_by(self, others: Sequence["TrainingRows"]) -> "TrainingRows":
        """Return the rows of several tasks, with the seeds of one after those of another; -1 fills up fewer rows."""
        parts = (self, *others)
        sizes = [len(part.tokens) for part in parts]
        offsets = np.cumsum([0, *sizes[:-1]])

        def filled(lines: Sequence[Int32[np.ndarray, "_ _"]]) -> np.ndarray:
            most = max(line.shape[1] for line in lines)
            return np.concatenate(
                [
                    np.pad(
                        line + offset,
                        ((0, 0), (0, most - line.shape[1])),
                        constant_values=-1,
                    )
                    for line, offset in zip(lines, offsets, strict=True)
                ]
            ).astype(np.int32)

        tokens = Encoded(
            sum((part.tokens.inputs for part in parts), ()),
            sum((part.tokens.labels for part in parts), ()),
        )
        split = Split(
            filled([part.split.train for part in parts]),
            filled([part.split.validation for part in parts]),
        )
        return self._replace(tokens=tokens, split=split)


def _table(encoded: Encoded, pad_id: int) -> _Table:
    lengths = _lengths(encoded)
    nothing = np.zeros(0, np.int32)
    source, target = map(bucket, lengths.max(axis=0).tolist())
    return _Table(
        input_ids=pad((*encoded.inputs, nothing), pad_id, source),
        labels=pad((*encoded.labels, nothing), IGNORED, target),
        lengths=lengths,
    )


def _lengths(encoded: Encoded) -> Int[np.ndarray, "_ 2"]:
    """Return the numbers of source and target tokens of all rows, and of an empty one behind them."""
    return np.array(
        [*zip(map(len, encoded.inputs), map(len, encoded.labels), strict=True), (0, 0)]
    )


def _packed(
    encoded: Encoded,
    rows: Int32[np.ndarray, "*leading B"],
    widths: Sequence[int],
    *,
    pad_id: int,
    causal: bool,
) -> Batch:
    """Return batches whose rows lie behind each other, of the widths of `Packing.plan`."""
    leading = rows.shape[:-1]
    source_width, target_width, *row_widths = widths
    ids = np.full((*leading, 1, source_width), pad_id, np.int32)
    labels = np.full((*leading, 1, target_width), IGNORED, np.int32)
    before = np.full((*leading, 1, target_width), -1, np.int32)
    lengths = np.maximum(_lengths(encoded) - np.array([causal, 0]), 0)[rows]
    ends = np.cumsum(lengths, axis=-2)
    begins = ends - lengths
    for batch in np.ndindex(leading):
        for row, begin, end in zip(
            rows[batch], begins[batch], ends[batch], strict=True
        ):
            if row < 0:
                continue
            source = encoded.inputs[row]
            target = encoded.labels[row]
            first, source = (source[-1:], source[:-1]) if causal else ([-1], source)
            ids[(*batch, 0, slice(begin[0], end[0]))] = source
            labels[(*batch, 0, slice(begin[1], end[1]))] = target
            in_front = np.concatenate([first, target])[:-1]
            before[(*batch, 0, slice(begin[1], end[1]))] = in_front

    def lines(part: int) -> tuple[np.ndarray, ...]:
        part_begins = begins[..., part]
        part_ends = ends[..., part]
        group_lines = []
        for indices, width in zip(groups(lengths), row_widths[part::2], strict=True):
            begin = np.take_along_axis(part_begins, indices, axis=-1)[..., None]
            end = np.take_along_axis(part_ends, indices, axis=-1)[..., None]
            places = begin + np.arange(width)
            filled = np.where(places < end, places, NOWHERE)
            group_lines.append(filled.astype(np.int32))
        return tuple(group_lines)

    real = np.arange(source_width) < lengths[..., 0].sum(axis=-1)[..., None, None]
    return Batch(ids, real, labels, rows >= 0, Rows(lines(0), lines(1), before))
