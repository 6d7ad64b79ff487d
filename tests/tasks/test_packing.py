"""Packed batches: no token is lost, no row is split, lanes are never longer than their width, rows keep their order."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion_jax.tasks import IGNORED, Encoded, Packing, batch_orders, train_batches, train_step_batches

_PAD = 0
_SEEDS = (3, 1)

lengths = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=25)


def _encoded(pairs):
    """Rows of given lengths without the padding token, every token another one."""
    token = iter(range(1, 10_000))
    columns = zip(*pairs, strict=True)
    return Encoded(*(tuple(np.array([next(token) for _ in range(n)], np.int32) for n in of) for of in columns))


def _packing(causal, scores=0.001):
    """Costs are numbers of tokens, and so much for each pair of tokens in a lane."""
    return Packing(causal, lambda lanes, s, t: 1e11 * lanes * ((s + t) + scores * (s + t) ** 2.0))


def _orders(pairs, batch_size):
    rows = np.tile(np.arange(len(pairs), dtype=np.int32), (len(_SEEDS), 1))
    return batch_orders(rows, batch_size=batch_size, epochs=2, seeds=_SEEDS)


def _check(encoded, rows, batch, causal):
    """The tokens of every row lie behind each other, in one lane, and those of later rows behind those of earlier."""
    sources, targets, before = batch.lanes
    np.testing.assert_array_equal(batch.row_mask, rows >= 0)
    np.testing.assert_array_equal(batch.input_mask, sources >= 0)
    assert (batch.input_ids[sources < 0] == _PAD).all() and (batch.labels[targets < 0] == IGNORED).all()
    found = set()
    for number, row in enumerate(rows):
        if row < 0:
            continue
        source, target = encoded.inputs[row], encoded.labels[row]
        prompt = source[:-1] if causal else source
        np.testing.assert_array_equal(batch.input_ids[sources == number], prompt)
        np.testing.assert_array_equal(batch.labels[targets == number], target)
        np.testing.assert_array_equal(before[targets == number], [source[-1] if causal else -1, *target[:-1]])
        lanes = {*np.nonzero(sources == number)[0].tolist(), *np.nonzero(targets == number)[0].tolist()}
        assert len(lanes) == 1
        found |= {number}
    assert {*np.unique(targets).tolist()} - {-1} == found
    assert {*np.unique(sources).tolist()} - {-1} <= found
    for lane in (*sources, *targets):  # no gaps, and rows in their order
        there = lane[lane >= 0]
        assert (lane[: len(there)] >= 0).all() and (np.diff(there) >= 0).all()


@settings(max_examples=60)
@given(lengths, st.integers(1, 12), st.booleans(), st.booleans(), st.integers(1, 4))
def test_nothing_is_lost_and_no_row_is_split(pairs, batch_size, causal, alike, length):
    encoded, orders = _encoded(pairs), _orders(pairs, batch_size)
    packing, shapes, step = _packing(causal), set(), 0
    for batches, cuts, cut_of in train_step_batches(
        encoded, orders, pad_id=_PAD, length=length, packing=packing, alike=alike
    ):
        for i in range(batches.row_mask.shape[1]):
            for seed in range(len(_SEEDS)):
                batch = jax.tree.map(lambda leaf, seed=seed, i=i: leaf[seed, i], batches)
                if cut_of is not None:
                    batch = batch.cut(*cuts[cut_of[i] if alike else cut_of[seed, i]])
                shapes.add((batch.input_ids.shape, batch.labels.shape))
                if batch.lanes is not None:
                    _check(encoded, orders[seed, step], batch, causal)
                else:
                    assert len(batch.input_ids) == orders.shape[2]
            step += 1
    assert step == orders.shape[1]
    assert len(shapes) <= 6


@pytest.mark.parametrize("causal", [False, True])
def test_few_computed_tokens_are_padding(causal):
    """At least 92 % of the computed tokens are real where rows differ as much as those of BIG-Bench Hard."""
    rng = np.random.default_rng(0)
    pairs = [(int(n), int(rng.integers(2, 6))) for n in np.clip(rng.normal(90, 25, 95), 5, None)]
    rows = np.arange(95, dtype=np.int32)[None]
    encoded, orders = _encoded(pairs), batch_orders(rows, batch_size=10, epochs=20, seeds=(1,))
    real = computed = 0
    for batch in train_batches(encoded, orders, pad_id=_PAD, packing=_packing(causal, 1e-4)):
        real += np.sum(batch.input_mask) + np.sum(batch.labels != IGNORED)
        computed += batch.input_ids.size + batch.labels.size
    assert real == sum(len(encoded.inputs[r]) - causal + len(encoded.labels[r]) for r in orders[orders >= 0])
    assert real >= 0.92 * computed


def _shapes(pairs, rows, packing, seeds=1):
    """Return shapes of sources, and whether rows are packed, in batches of so many rows, the same for all seeds."""
    orders = np.tile(np.arange(len(pairs), dtype=np.int32).reshape(1, -1, rows), (seeds, 1, 1))
    batches = train_batches(_encoded(pairs), orders, pad_id=_PAD, packing=packing)
    return {(batch.input_ids.shape[1:], batch.lanes is not None) for batch in batches}


def test_lanes_are_short_where_long_ones_cost_more_than_they_save():
    pairs = [(41, 5)] * 8
    assert _shapes(pairs, 8, _packing(False, 0.0)) == {((1, 328), True)}
    assert _shapes(pairs, 8, _packing(False, 1.0)) == {((8, 44), False)}  # rows of their own are padded


def test_every_shape_has_to_save_what_its_compilation_costs():
    few, many = [(40, 2), *[(4, 2)] * 3], [*[(40, 2)] * 3, (4, 2)]

    def shapes(cost, seeds=1):
        return _shapes([*few, *many] * 2, 4, Packing(False, lambda lanes, s, t: cost * lanes * (s + t)), seeds)

    assert shapes(1e10) == {((1, 52), True), ((1, 124), True)}
    assert shapes(1.5e9) == {((1, 124), True)}
    assert shapes(1.5e9, seeds=2) == shapes(1e10)  # seeds in one program share its compilation
    assert shapes(5e8) == {((4, 40), False)}
