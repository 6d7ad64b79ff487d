"""Packed batches: no token is lost, rows keep their order, and attention takes every row apart whole, in two groups."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.testing import assert_array_equal

from lorafusion_jax.tasks import (
    IGNORED,
    Encoded,
    Packing,
    batch_orders,
    train_batches,
    train_step_batches,
)
from lorafusion_jax.tasks.batches import NOWHERE

_PAD = 0
_SEEDS = (3, 1)

lengths = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=25
)


def _encoded(pairs):
    """Rows of given lengths without the padding token, every token another one."""
    token = iter(range(1, 10_000))
    columns = zip(*pairs, strict=True)
    return Encoded(
        *(
            tuple(np.array([next(token) for _ in range(n)], np.int32) for n in of)
            for of in columns
        )
    )


def _packing(causal, scores=0.001):
    """Costs are numbers of tokens, and so much for each pair of tokens in a row."""

    def operations(source, target, rows):
        return 1e11 * (
            source
            + target
            + scores * sum(count * (s + t) ** 2.0 for count, s, t in rows)
        )

    return Packing(causal, operations)


def _orders(pairs, batch_size):
    rows = np.tile(np.arange(len(pairs), dtype=np.int32), (len(_SEEDS), 1))
    return batch_orders(rows, batch_size=batch_size, epochs=2, seeds=_SEEDS)


def _check(encoded, rows, batch, causal):
    """Rows lie behind each other in their order. Those of a group are in its lines, longer ones in earlier groups."""
    sources, targets, before = batch.rows
    assert_array_equal(batch.row_mask, rows >= 0)
    real = [row for row in rows if row >= 0]
    prompts = [
        encoded.inputs[row][:-1] if causal else encoded.inputs[row] for row in real
    ]
    answers = [encoded.labels[row] for row in real]
    in_front = [
        [encoded.inputs[row][-1] if causal else -1, *encoded.labels[row][:-1]]
        for row in real
    ]
    for line, parts, fill in (
        (batch.input_ids, prompts, _PAD),
        (batch.labels, answers, IGNORED),
        (before, in_front, -1),
    ):
        text = np.concatenate([*parts, []])
        assert len(line) == 1
        assert_array_equal(line[0, : len(text)], text)
        assert (line[0, len(text) :] == fill).all()
    assert_array_equal(
        batch.input_mask[0],
        np.arange(len(batch.input_mask[0])) < sum(map(len, prompts)),
    )
    found = []
    shortest = np.inf
    for of_source, of_target in zip(sources, targets, strict=True):
        texts = []
        for line, answer in zip(of_source, of_target, strict=True):
            for places in (line, answer):  # no gaps
                there = places[places < NOWHERE]
                assert (places[len(there) :] == NOWHERE).all() and (
                    np.diff(there) == 1
                ).all()
            prompt = batch.input_ids[0, line[line < NOWHERE]]
            texts.append(
                (
                    tuple(prompt.tolist()),
                    tuple(batch.labels[0, answer[answer < NOWHERE]].tolist()),
                )
            )
        found += [text for text in texts if text != ((), ())]
        sizes = [len(prompt) + len(answer) for prompt, answer in texts]
        assert max(sizes) <= shortest
        shortest = min(sizes)
    wanted = [
        (tuple(x.tolist()), tuple(y.tolist()))
        for x, y in zip(prompts, answers, strict=True)
    ]
    assert sorted(found) == sorted(wanted)


@settings(max_examples=60)
@given(lengths, st.integers(1, 12), st.booleans(), st.booleans(), st.integers(1, 4))
def test_nothing_is_lost_and_every_row_is_taken_apart_whole(
    pairs, batch_size, causal, alike, length
):
    encoded = _encoded(pairs)
    orders = _orders(pairs, batch_size)
    packing = _packing(causal)
    shapes = set()
    step = 0
    for batches, cuts, cut_of in train_step_batches(
        encoded, orders, pad_id=_PAD, length=length, packing=packing, alike=alike
    ):
        for i in range(batches.row_mask.shape[1]):
            for seed in range(len(_SEEDS)):
                batch = jax.tree.map(
                    lambda leaf, seed=seed, i=i: leaf[seed, i], batches
                )
                if cut_of is not None:
                    batch = batch.cut(*cuts[cut_of[i] if alike else cut_of[seed, i]])
                shapes.add(tuple(leaf.shape for leaf in jax.tree.leaves(batch)))
                if batch.rows is not None:
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
    sources = np.clip(rng.normal(90, 25, 95), 5, None).astype(int)
    encoded = _encoded([*zip(sources, rng.integers(2, 6, 95), strict=True)])
    orders = batch_orders(
        np.arange(95, dtype=np.int32)[None], batch_size=10, epochs=20, seeds=(1,)
    )
    real = computed = 0
    for batch in train_batches(
        encoded, orders, pad_id=_PAD, packing=_packing(causal, 1e-4)
    ):
        real += np.sum(batch.input_mask) + np.sum(batch.labels != IGNORED)
        computed += batch.input_ids.size + batch.labels.size
    assert real >= 0.92 * computed


def _shapes(pairs, rows, packing, seeds=1):
    """Return shapes of sources, and whether rows are packed, in batches of so many rows, the same for all seeds."""
    orders = np.tile(
        np.arange(len(pairs), dtype=np.int32).reshape(1, -1, rows), (seeds, 1, 1)
    )
    batches = train_batches(_encoded(pairs), orders, pad_id=_PAD, packing=packing)
    return {(batch.input_ids.shape[1:], batch.rows is not None) for batch in batches}


def test_rows_without_padding_are_not_packed():
    assert _shapes([(40, 4)] * 8, 8, _packing(False)) == {((8, 40), False)}


def test_every_shape_has_to_save_what_its_compilation_costs():
    few = [(40, 2), *[(4, 2)] * 3]
    many = [*[(40, 2)] * 3, (4, 2)]

    def shapes(cost, seeds=1):
        packing = Packing(False, lambda source, target, rows: cost * (source + target))
        return _shapes([*few, *many] * 2, 4, packing, seeds)

    assert shapes(1e10) == {((1, 52), True), ((1, 128), True)}
    assert shapes(3.2e9) == {((1, 128), True)}
    assert shapes(3.2e9, seeds=2) == shapes(
        1e10
    )  # seeds in one program share its compilation
    assert shapes(5e8) == {((4, 40), False)}


def test_packing_has_to_save_what_moving_the_rows_costs():
    rows = [(40, 4), (40, 4), (24, 4), (24, 4)]  # 144 real tokens of 176
    for moving, packed in ((1.0, True), (1.1, True), (1.5, False)):
        packing = _packing(False)._replace(compiling=0.0, moving=moving)
        assert {was for _, was in _shapes(rows, 4, packing)} == {packed}
