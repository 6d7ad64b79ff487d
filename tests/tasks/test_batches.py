"""Padding and batching: nothing lost, nothing twice, masks exact, few shapes, little padding."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.testing import assert_array_equal
from refusals import refused

from lorafusion_jax import tasks

_PAD = 0

lengths = st.lists(
    st.tuples(st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=40
)


def _encoded(pairs):
    """Rows of given lengths, every token telling its row and none the padding token."""
    return tasks.Encoded(
        inputs=tuple(
            np.full(source, 1000 + i, np.int32) for i, (source, _) in enumerate(pairs)
        ),
        labels=tuple(
            np.full(target, 2000 + i, np.int32) for i, (_, target) in enumerate(pairs)
        ),
    )


def _check(encoded, rows, batch):
    """Every row of the batch holds exactly its tokens, and a row of number -1 nothing."""
    assert batch.input_ids.dtype == batch.labels.dtype == np.int32
    assert batch.input_mask.dtype == batch.row_mask.dtype == np.bool_
    assert_array_equal(batch.row_mask, rows >= 0)
    assert_array_equal(batch.input_ids[~batch.input_mask], _PAD)
    for index in np.ndindex(rows.shape):
        row = rows[index]
        inputs, labels = (
            (encoded.inputs[row], encoded.labels[row]) if row >= 0 else ([], [])
        )
        assert_array_equal(
            batch.input_mask[index], np.arange(batch.input_ids.shape[-1]) < len(inputs)
        )
        assert_array_equal(batch.input_ids[index][batch.input_mask[index]], inputs)
        assert_array_equal(batch.labels[index][: len(labels)], labels)
        assert_array_equal(batch.labels[index][len(labels) :], tasks.IGNORED)


def _shapes(batches):
    return {(batch.input_ids.shape, batch.labels.shape) for batch in batches}


def test_ladder():
    widths = sorted({tasks.bucket(length) for length in range(2049)})
    assert widths[:24] == [*range(4, 65, 4), 72, 80, 88, 96, 104, 112, 120, 128]
    assert widths[-1] == 2048
    for length in range(2049):
        assert tasks.bucket(length) == next(
            width for width in widths if width >= length
        )


def test_an_answer_is_at_most_twice_as_long_as_a_training_target_and_256_tokens():
    assert [tasks.most_new_tokens(longest) for longest in (1, 5, 40, 128, 500)] == [
        4,
        12,
        80,
        256,
        256,
    ]


@given(
    st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1), st.integers(0, 3)
)
def test_pad(sequences, room):
    width = max(map(len, sequences)) + room
    padded = tasks.pad(
        [np.array(sequence, np.int32) for sequence in sequences], -7, width
    )
    assert padded.dtype == np.int32
    assert padded.tolist() == [
        sequence + [-7] * (width - len(sequence)) for sequence in sequences
    ]
    with refused(f"sequence 0 has {width + 1} tokens: expected at most {width}"):
        tasks.pad([np.arange(width + 1)], _PAD, width)


@settings(max_examples=40)
@given(lengths, st.integers(1, 12))
def test_eval_batches(pairs, batch_size):
    encoded = _encoded(pairs)
    batches = list(tasks.eval_batches(encoded, batch_size, pad_id=_PAD))
    for rows, batch in batches:
        _check(encoded, rows, batch)
    order = np.concatenate([rows for rows, _ in batches])
    assert sorted(order[order >= 0].tolist()) == list(range(len(pairs)))
    assert len(_shapes(batch for _, batch in batches)) <= 6
    # The real rows come shortest first.
    assert (np.diff([len(encoded.inputs[row]) for row in order[order >= 0]]) >= 0).all()
    # All batches of a shape have the smallest size for their number, and only the last one is filled up.
    for shape in _shapes(batch for _, batch in batches):
        group = [
            rows
            for rows, batch in batches
            if (batch.input_ids.shape, batch.labels.shape) == shape
        ]
        count = sum(int(np.sum(rows >= 0)) for rows in group)
        assert len(group) == -(-count // batch_size) and shape[0][0] == -(
            -count // len(group)
        )
        assert (np.concatenate(group)[:count] >= 0).all()


@settings(max_examples=40)
@given(lengths.filter(lambda pairs: len(pairs) > 1), st.integers(1, 12), st.booleans())
def test_train_batches(pairs, batch_size, reference):
    encoded, orders = _epochs(pairs, batch_size, reference)
    batches = list(tasks.train_batches(encoded, orders, pad_id=_PAD))
    assert len(batches) == orders.shape[1]
    for step, batch in enumerate(batches):
        assert batch.input_ids.shape[:2] == orders[:, step].shape
        _check(encoded, orders[:, step], batch)
    assert len(_shapes(batches)) <= 6


@settings(max_examples=40)
@given(
    lengths.filter(lambda pairs: len(pairs) > 1),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_intervals_hold_the_batches_of_their_steps_from_any_step_on(
    pairs, batch_size, length, first_step
):
    encoded, orders = _epochs(pairs, batch_size, reference=False)
    batches = list(tasks.train_batches(encoded, orders, pad_id=_PAD))
    intervals = list(
        tasks.train_step_batches(
            encoded, orders, pad_id=_PAD, length=length, first_step=first_step
        )
    )
    steps = [interval.batches.row_mask.shape[1] for interval in intervals]
    ends = (first_step + np.cumsum(steps)).tolist()
    assert all(end % length == 0 for end in ends[:-1]) and max([0, *steps]) <= length
    assert ends[-1:] == ([len(batches)] if first_step < len(batches) else [])
    # All intervals of several steps are alike, so that one program takes them.
    assert (
        length == 1
        or len(
            {
                (b.input_ids.shape[2:], b.labels.shape[2:], shapes)
                for b, shapes, _ in intervals
            }
        )
        <= 1
    )
    cut = [
        jax.tree.map(lambda leaf, i=i: leaf[:, i], batches).cut(
            *(shapes[shape_of[i]] if shapes else (512, 64))
        )
        for batches, shapes, shape_of in intervals
        for i in range(batches.row_mask.shape[1])
    ]
    for ours, theirs in zip(cut, batches[first_step:], strict=True):
        jax.tree.map(assert_array_equal, ours, theirs)


def _epochs(pairs, batch_size, reference):
    """Rows, and the order of three seeds in two epochs."""
    encoded = _encoded(pairs)
    seeds = [3, 1, 4]
    rows = tasks.split(
        len(pairs), seeds, protocol="reference" if reference else "default"
    ).train
    return encoded, tasks.batch_orders(
        rows, batch_size=batch_size, epochs=2, seeds=None if reference else seeds
    )


def test_a_step_is_as_wide_as_the_longest_row_of_any_seed():
    encoded = _encoded([(3, 1), (50, 9), (7, 2), (18, 3)])
    orders = np.array([[[0], [2], [3]], [[2], [0], [1]]], np.int32)
    shapes = [
        (b.input_ids.shape, b.labels.shape)
        for b in tasks.train_batches(encoded, orders, pad_id=_PAD)
    ]
    assert shapes == [
        ((2, 1, 8), (2, 1, 4)),
        ((2, 1, 8), (2, 1, 4)),
        ((2, 1, 52), (2, 1, 12)),
    ]


@pytest.mark.parametrize(
    ("lengths", "widths"),
    [
        ([16, 20, 24, 28, 32, 64, 128, 256, 512], [32] * 5 + [64, 128, 256, 512]),
        # 8 joins 12 (4 more tokens), then 20 joins 32 (12 more): 12 with its guest in 20 would be 16 more.
        ([8, 12, 20, 32, 64, 128, 256], [12, 12, 32, 32, 64, 128, 256]),
    ],
)
def test_more_than_six_widths_are_merged_where_it_costs_least(lengths, widths):
    # A hundred batches of width 4 must not be padded to anything more.
    encoded = _encoded([(4, 1)] * 100 + [(length, 1) for length in lengths])
    orders = np.arange(len(encoded), dtype=np.int32)[None, :, None]
    batches = tasks.train_batches(encoded, orders, pad_id=_PAD)
    assert [batch.input_ids.shape[2] for batch in batches] == [4] * 100 + widths
