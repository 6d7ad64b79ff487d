"""Merges without data against NumPy in float64, written from PEFT's source."""

from dataclasses import replace
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from numpy.testing import assert_array_equal

import lorafusion_jax as lf
from lorafusion_jax.adapters import MergeKind
from lorafusion_jax.adapters.merges import dare_masks, merge

_INDEX = (3, 0, 2)
_WEIGHTS = (0.7, -0.4, 0.5)
_KEY = jax.random.key(5)
_SITE = "encoder.self.q"
_close = partial(np.testing.assert_allclose, rtol=0, atol=2e-5)


def _pool():
    """Four modules of one rank and several scalings, of which two lack a layer."""

    def ranks(n, site, layer):
        return 0 if (n, layer) in ((0, 1), (2, 0)) else 4

    pool = tiny.pool(4, ranks)
    rank = pool.rank[_SITE]
    scaling = jnp.where(rank > 0, jnp.array([[2.0, 0.5, 1.0, 3.0]]), 0.0)
    return replace(
        pool,
        A={_SITE: pool.A[_SITE]},
        B={_SITE: pool.B[_SITE]},
        rank={_SITE: rank},
        scaling={_SITE: scaling},
    )


_POOL = _pool()


@partial(jax.jit, static_argnames=("kind", "density"))
def _merged(pool, index, weights, key, kind, density=0.5):
    adapters = merge(pool, index, weights, kind, density=density, key=key)
    return tiny.matrices(adapters, {_SITE: jnp.zeros((3, 16, 12))})[_SITE]


def _update(pool=_POOL, index=_INDEX, weights=_WEIGHTS, key=_KEY, **kwargs):
    weights = jnp.array(weights, jnp.float32)
    return np.asarray(_merged(pool, jnp.array(index), weights, key, **kwargs))


def _combine(tasks, weights, kind, density, masks=None):
    """Return one matrix of all modules, [N, a, b], by the rule of PEFT's merge_utils.py."""
    if kind.startswith("dare"):
        tasks = tasks * masks / density
    elif kind != "linear":
        pruned = np.zeros_like(tasks)
        for n, task in enumerate(tasks):
            order = np.argsort(-np.abs(task), axis=None, kind="stable")
            largest = order[: int(density * task.size)]
            pruned[n].flat[largest] = task.flat[largest]
        tasks = pruned
    weighted = tasks * np.reshape(weights, (-1, 1, 1))
    if not kind.endswith("ties"):
        return weighted.sum(axis=0)
    agreeing = np.sign(tasks) == np.where(tasks.sum(axis=0) >= 0, 1, -1)
    return (weighted * agreeing).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1)


def _oracle(kind, density, layer):
    index = jnp.array([i for i in _INDEX if _POOL.rank[_SITE][layer, i]])
    weights = np.array([_WEIGHTS[_INDEX.index(i)] for i in index])
    A = np.asarray(_POOL.A[_SITE][layer, index], np.float64)
    B = np.asarray(_POOL.B[_SITE][layer, index], np.float64)
    if kind in ("cat", "svd"):
        update = _combine(A @ B, weights, "linear", density)
        if kind == "cat":
            return update
        u, s, v = np.linalg.svd(update, full_matrices=False)
        return (u[:, :4] * s[:4]) @ v[:4]

    def masks(matrix, shape):
        name = f"{matrix} of {_SITE}"
        numbers = jnp.int32(layer), shape, density
        return np.asarray(dare_masks(_KEY, _POOL.names, index, name, *numbers))

    scaling = np.asarray(_POOL.scaling[_SITE])[layer, index]
    root = np.sqrt(np.abs(weights * scaling))
    B = B / scaling[:, None, None]
    left = np.sign(weights * scaling) * root
    return _combine(A, left, kind, density, masks("A", A.shape[1:])) @ _combine(
        B, root, kind, density, masks("B", B.shape[1:])
    )


@pytest.mark.parametrize("kind", get_args(MergeKind))
def test_merges_are_what_peft_defines(kind):
    for layer, update in enumerate(_update(kind=kind, density=0.3)):
        wanted = _oracle(kind, 0.3, layer)
        assert np.abs(wanted).max() > 0.01
        _close(update, wanted)


@pytest.mark.parametrize("kind", ["linear", "ties"])
def test_unknown_scalings_count_as_equal(kind):
    equal = {_SITE: jnp.full((3, 4), 2.5)}
    wanted = _update(replace(_POOL, scaling=equal), kind=kind)
    _close(_update(replace(_POOL, scaling=None), kind=kind), wanted)
    assert np.abs(wanted - _update(kind=kind)).max() > 0.01


def test_of_equal_entries_the_first_are_kept():
    signs = replace(_POOL, A=jax.tree.map(jnp.sign, _POOL.A))
    index = jnp.array([1, 3])
    lora = merge(signs, index, jnp.ones(2), "magnitude_prune", density=0.25)[_SITE]
    A = np.asarray(lora.A)
    assert not A[:, 4:].any() and A[:, :4].any(axis=(1, 2)).all()


def test_entries_that_cancel_count_as_positive():
    pool = _POOL.select([1, 3])
    A = pool.A[_SITE][:, 0]
    opposite = replace(pool, A={_SITE: jnp.stack([A, -A], axis=1)})
    lora = merge(opposite, jnp.arange(2), jnp.ones(2), "ties", density=1.0)[_SITE]
    assert_array_equal(np.sign(lora.A), A != 0)


def test_a_dare_depends_on_key_name_site_and_layer_alone():
    first = _update(kind="dare_linear")
    assert_array_equal(first, _update(kind="dare_linear"))
    other = _update(kind="dare_linear", key=jax.random.key(6))
    assert np.abs(other - first).max() > 0.01
    alone = _POOL.select([_POOL.names[i] for i in _INDEX])
    _close(_update(alone, index=range(3), kind="dare_linear"), first)
    masks = [
        dare_masks(_KEY, _POOL.names, jnp.arange(4), site, layer, (30, 40), 0.3)
        for site in ("A of encoder.self.q", "A of encoder.self.v")
        for layer in jnp.arange(2)
    ]
    stacked = np.concatenate(masks)
    assert abs(stacked.mean() - 0.3) < 0.02
    assert len({mask.tobytes() for mask in stacked}) == 16


@pytest.mark.parametrize("kind", ["linear", "dare_ties", "svd"])
def test_merges_map_over_seeds(kind):
    index = jnp.array([[3, 0, 2], [1, 2, 3]])
    keys = jax.random.split(jax.random.key(1), 2)
    method = lf.Merge(kind=kind)
    frozen = lf.Frozen(nnx.State({}), _POOL)
    start = jax.jit(jax.vmap(lambda i, k: method.init(frozen, i, k)))
    both = start(index, keys)["merged"]
    for seed in range(2):
        update = _update(
            index=index[seed], weights=[1 / 3] * 3, key=keys[seed], kind=kind
        )
        _close(both["A"][_SITE][seed] @ both["B"][_SITE][seed], update)


def test_a_quantised_pool_merges_as_what_it_holds():
    exact = _update(kind="ties")
    error = np.abs(_update(_POOL.quantised("int8"), kind="ties") - exact)
    assert 0 < error.mean() < 0.1 * np.abs(exact).mean()
