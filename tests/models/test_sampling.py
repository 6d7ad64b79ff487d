"""Draws of the next token: filters against NumPy, frequencies, and rows that do not depend on each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given, settings, strategies as st
from numpy.testing import assert_array_equal
from refusals import refused

from lorafusion_jax import Sampling, generate

_TOKENS = 6


@functools.partial(jax.jit, static_argnames="sampling")
def _probabilities(logits, sampling):
    return jax.nn.softmax(sampling.filtered(logits), axis=-1)


def _oracle(logits, sampling):
    """Probabilities of one row: a token stays if few enough, and unlikely enough, tokens are likelier than it."""
    scaled = (logits - logits.max()) / np.float32(sampling.temperature)
    kept = [
        sampling.top_k is None or np.sum(scaled > x) < sampling.top_k for x in scaled
    ]
    weights = np.where(kept, np.exp(scaled.astype(np.float64)), 0)
    weights /= weights.sum()
    kept = kept & np.array([weights[scaled > x].sum() < sampling.top_p for x in scaled])
    return np.where(kept, weights, 0) / weights[kept].sum()


@given(
    # Few values, so that many are equal; steps that no rounding makes equal.
    logits=st.lists(st.integers(-8, 8), min_size=12, max_size=12),
    sampling=st.sampled_from(
        [
            Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
            for temperature, top_k in ((0.37, None), (2.0, 4))
            for top_p in (0.513, 0.937)
        ]
    ),
)
@settings(max_examples=100)
def test_the_distribution_is_that_of_numpy(logits, sampling):
    row = np.array(logits, np.float32) * np.float32(0.7)
    found = _probabilities(jnp.asarray(row)[None], sampling)[0]
    np.testing.assert_allclose(found, _oracle(row, sampling), rtol=1e-5, atol=1e-7)


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    sampling = Sampling(temperature=0.8, top_k=6, top_p=0.9)
    draws = 20_000
    row = np.array([0.3, 2.0, -1.0, 1.1, 2.0, 0.1, 1.4, -3.0], np.float32)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(
        jnp.arange(draws)
    )
    drawn = jax.jit(sampling.choose)(
        jnp.broadcast_to(row, (draws, 8)), jnp.int32(5), keys
    )
    wanted = draws * _oracle(row, sampling)
    counts = np.bincount(drawn, minlength=8)
    assert_array_equal(counts > 0, wanted > 0)
    real = wanted > 0
    assert real.sum() == 4
    # Chi-squared with 3 degrees of freedom: above 16.3 once in a thousand seeds.
    assert np.sum((counts - wanted)[real] ** 2 / wanted[real]) < 16.3


@functools.partial(jax.jit, static_argnames=("graph", "sampling"))
def _say(graph, weights, ids, row_keys, sampling):
    model = nnx.merge(graph, weights)
    return generate(
        model,
        ids,
        ids > 0,
        max_new_tokens=_TOKENS,
        sampling=sampling,
        row_keys=row_keys,
    )


@pytest.fixture(scope="module")
def said():
    """A model's graph, weights, sources and keys, and its draws."""
    graph, weights = nnx.split(tiny.t5())
    ids = jax.random.randint(jax.random.key(1), (3, 5), 1, 40)
    keys = jax.random.split(jax.random.key(2), 3)
    sampling = Sampling(temperature=1.5)
    return (
        graph,
        weights,
        ids,
        keys,
        sampling,
        _say(graph, weights, ids, keys, sampling),
    )


def test_a_row_s_draws_depend_on_no_other_row(said):
    graph, weights, ids, keys, sampling, together = said
    assert_array_equal(_say(graph, weights, ids, keys, sampling), together)
    turned = jnp.array([2, 0, 1])
    assert_array_equal(
        _say(graph, weights, ids[turned], keys[turned], sampling), together[turned]
    )
    # The same source with another key, and another source with the same key, give something else.
    mixed = _say(
        graph, weights, ids.at[2].set(ids[0]), keys.at[1].set(keys[0]), sampling
    )
    assert_array_equal(mixed[0], together[0])
    assert not np.array_equal(mixed[1], together[1]) and not np.array_equal(
        mixed[2], together[0]
    )


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: expected a number from 1e-6 up"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0: expected at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0: expected a probability"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": 0.9}, "temperature 0 draws nothing: give a temperature"),
    ],
)
def test_numbers_that_describe_no_draw(numbers, message):
    with refused(message):
        Sampling(**numbers)


def test_a_generation_needs_a_length_and_a_draw_needs_keys(said):
    graph, weights, ids, _, sampling, _ = said
    with refused("max_new_tokens is 0: expected at least 1"):
        generate(nnx.merge(graph, weights), ids, ids > 0, max_new_tokens=0)
    with refused("a draw needs a key for every row"):
        _say(graph, weights, ids, None, sampling)
