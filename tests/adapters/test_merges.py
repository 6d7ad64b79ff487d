"""Merges without data against NumPy in float64, written from PEFT's source; and the controls' shuffled layers."""

import dataclasses
import zlib
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from lorafusion_jax import Frozen, Merge, shared_basis, shuffled_pool
from lorafusion_jax.adapters import MergeKind
from lorafusion_jax.adapters.merges import check_merge, dare_masks, merge

_KINDS = get_args(MergeKind)
_INDEX = (3, 0, 2)
_WEIGHTS = (0.7, -0.4, 0.5)
_KEY = jax.random.key(5)


def _pool(sites=("encoder.self.q",)):
    """Four modules of one rank and several scalings, of which two lack a layer."""

    def ranks(n, site, layer):
        return 0 if (n, layer) in ((0, 1), (2, 0)) else 4

    pool = tiny.pool(4, ranks, names="qv")
    A = {site: pool.A[site] for site in sites}
    B = {site: pool.B[site] for site in sites}
    rank = {site: pool.rank[site] for site in sites}
    scaling = {
        site: jnp.where(r > 0, jnp.array([[2.0, 0.5, 1.0, 3.0]]), 0.0)
        for site, r in rank.items()
    }
    return dataclasses.replace(pool, A=A, B=B, rank=rank, scaling=scaling)


_POOL = _pool()


@partial(jax.jit, static_argnames=("kind", "density"))
def _merged(pool, index, weights, key, kind, density=0.5):
    adapters = merge(pool, index, weights, kind, density=density, key=key)
    unit = {s: jnp.eye(weight.shape[2]) for s, weight in pool.A.items()}
    run = {
        s: jax.vmap(lambda a, u=unit[s]: a(u, jnp.zeros((u.shape[0], a.B.shape[-1]))))
        for s in adapters
    }
    return {s: run[s](adapter) for s, adapter in adapters.items()}


def _update(pool=_POOL, index=_INDEX, weights=_WEIGHTS, key=_KEY, **kwargs):
    return _merged(
        pool, jnp.array(index), jnp.array(weights, jnp.float32), key, **kwargs
    )


def _combine(tasks, weights, rule, density, kept):
    """One matrix of all modules, [N, a, b], by the rule of PEFT's merge_utils.py."""
    tasks = np.stack(tasks)
    if rule.startswith("dare"):
        tasks = tasks * kept / density
    elif rule != "linear":
        pruned = np.zeros_like(tasks)
        for n, task in enumerate(tasks):
            order = np.argsort(-np.abs(task), axis=None, kind="stable")[
                : int(density * task.size)
            ]
            pruned[n].flat[order] = task.flat[order]
        tasks = pruned
    weighted = tasks * np.reshape(weights, (-1, 1, 1))
    if not rule.endswith("ties"):
        return weighted.sum(axis=0)
    agreeing = np.sign(tasks) == np.where(tasks.sum(axis=0) >= 0, 1, -1)
    return (weighted * agreeing).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1)


def _oracle(pool, index, weights, kind, density, rank):
    found = {}
    for site in pool.A:
        A = np.asarray(pool.A[site], np.float64)
        B = np.asarray(pool.B[site], np.float64)
        for layer in range(A.shape[0]):
            there = [
                (i, w)
                for i, w in zip(index, weights, strict=True)
                if pool.rank[site][layer, i]
            ]
            at = jnp.array([i for i, _ in there])
            w = np.array([w for _, w in there])

            def kept(what, shape, site=site, layer=layer, at=at):
                return np.asarray(
                    dare_masks(
                        _KEY,
                        pool.names,
                        at,
                        f"{what} of {site}",
                        jnp.int32(layer),
                        shape,
                        density,
                    )
                )

            updates = [A[layer, i] @ B[layer, i] for i, _ in there]
            if kind == "cat":
                found[site, layer] = _combine(updates, w, "linear", None, None)
            elif kind == "svd":
                u, s, v = np.linalg.svd(
                    _combine(updates, w, "linear", None, None), full_matrices=False
                )
                found[site, layer] = (u[:, :rank] * s[:rank]) @ v[:rank]
            else:
                s = np.asarray(pool.scaling[site])[layer, at]
                root = np.sqrt(np.abs(w * s))
                left = A[layer, at]
                right = B[layer, at] / s[:, None, None]
                found[site, layer] = _combine(
                    left, np.sign(w * s) * root, kind, density, kept("A", left[0].shape)
                ) @ _combine(right, root, kind, density, kept("B", right[0].shape))
    return found


def _close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", _KINDS)
def test_merges_are_what_peft_defines(kind):
    got = _update(kind=kind, density=0.3)
    rank = max(A.shape[-1] for A in _POOL.A.values())
    for (site, layer), wanted in _oracle(
        _POOL, _INDEX, _WEIGHTS, kind, 0.3, rank
    ).items():
        assert np.abs(wanted).max() > 0.01
        _close(got[site][layer], wanted)


def test_unknown_scalings_count_as_equal():
    alike = dataclasses.replace(
        _POOL, scaling={s: jnp.full(r.shape, 2.5) for s, r in _POOL.rank.items()}
    )
    for kind in ("linear", "ties"):
        wanted = _update(alike, kind=kind)
        for site, got in _update(
            dataclasses.replace(_POOL, scaling=None), kind=kind
        ).items():
            _close(got, wanted[site])
            assert (
                np.abs(
                    np.asarray(wanted[site]) - np.asarray(_update(kind=kind)[site])
                ).max()
                > 0.01
            )


def test_of_equal_entries_the_first_are_kept():
    flat = dataclasses.replace(
        _POOL, A=jax.tree.map(lambda a: jnp.where(a == 0, 0.0, jnp.sign(a)), _POOL.A)
    )
    got = merge(flat, jnp.array([1, 3]), jnp.ones(2), "magnitude_prune", density=0.25)
    for site, lora in got.items():
        assert not np.asarray(lora.A)[:, 4:].any()
        assert np.asarray(lora.A)[:, :4].any(axis=(1, 2)).all(), site


def test_entries_that_cancel_count_as_positive():
    pool = _POOL.select([1, 3])
    opposite = dataclasses.replace(
        pool, A={s: jnp.stack([a[:, 0], -a[:, 0]], axis=1) for s, a in pool.A.items()}
    )
    for site, lora in merge(
        opposite, jnp.arange(2), jnp.ones(2), "ties", density=1.0
    ).items():
        assert (lora.A >= 0).all() and ((lora.A > 0) == (pool.A[site][:, 0] != 0)).all()


def test_a_dare_depends_on_key_name_site_and_layer_alone():
    first = _update(kind="dare_linear")
    jax.tree.map(np.testing.assert_array_equal, first, _update(kind="dare_linear"))
    for site, other in _update(kind="dare_linear", key=jax.random.key(6)).items():
        assert np.abs(np.asarray(other - first[site])).max() > 0.01
    alone = _POOL.select([_POOL.names[i] for i in _INDEX])
    for site, again in _update(alone, index=range(3), kind="dare_linear").items():
        _close(again, first[site])
    masks = [
        np.asarray(
            dare_masks(
                _KEY, _POOL.names, jnp.arange(4), site, jnp.int32(layer), (30, 40), 0.3
            )
        )
        for site, layer in (
            ("A of encoder.self.q", 0),
            ("A of encoder.self.q", 1),
            ("A of encoder.self.v", 0),
        )
    ]
    stacked = np.concatenate(masks)
    assert abs(stacked.mean() - 0.3) < 0.02
    assert len({mask.tobytes() for mask in stacked}) == 12


@pytest.mark.parametrize("kind", ["linear", "dare_ties", "svd"])
def test_merges_map_over_seeds(kind):
    index = jnp.array([[3, 0, 2], [1, 2, 3]])
    keys = jnp.stack([jax.random.key(1), jax.random.key(2)])
    method = Merge(kind=kind)
    frozen = Frozen(nnx.State({}), _POOL)
    both = jax.jit(jax.vmap(lambda i, k: method.init(frozen, i, k)))(index, keys)[
        "merged"
    ]
    for seed in range(2):
        one = _update(index=index[seed], weights=[1 / 3] * 3, key=keys[seed], kind=kind)
        for site in one:
            _close(both["A"][site][seed] @ both["B"][site][seed], one[site])


def test_a_quantised_pool_merges_as_what_it_holds():
    pool = _POOL.quantised("int8")
    for site, got in _update(pool, kind="ties").items():
        near = np.asarray(_update(kind="ties")[site])
        assert 0 < np.abs(np.asarray(got) - near).mean() < 0.1 * np.abs(near).mean()


def test_merges_that_cannot_be_are_refused():
    mixed = tiny.pool(2, lambda n, site, layer: 2 + n)
    dora = dataclasses.replace(tiny.pool(1), magnitude={})
    for kind in ("cat", "svd"):
        Merge(kind=kind).check(mixed)
    index = jnp.arange(2)
    ones = jnp.ones(2)
    for refused, message in (
        (
            lambda: Merge(kind="ties").check(mixed),
            "different ranks, and ties adds .* use cat or svd, or",
        ),
        (
            lambda: check_merge(mixed, "linear"),
            "and linear adds .* use cat or svd, or a pool of one rank",
        ),
        (
            lambda: merge(mixed, index, ones, "linear"),
            "different ranks, and linear adds",
        ),
        (lambda: check_merge(dora, "svd"), "a DoRA adapter has magnitudes"),
        (
            lambda: merge(dora, jnp.arange(1), jnp.ones(1), "cat"),
            "a DoRA adapter has magnitudes",
        ),
        (
            lambda: merge(_POOL, index, ones, "dare_ties"),
            "dare_ties keeps random entries: give a key",
        ),
        (
            lambda: Merge(kind="linear").check(shared_basis(tiny.pool(2), 3)),
            "a merge needs a pool of whole modules",
        ),
        (
            lambda: Merge(kind="linear").init(Frozen(nnx.State({})), index, _KEY),
            "a merge needs a pool",
        ),
        (lambda: Merge(kind="ties", density=0.0), "density is 0.0: give the share"),
        (lambda: Merge(kind="ties", density=1.5), "density is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_the_shuffled_control_moves_whole_layers():
    pool = _pool(("encoder.self.q", "encoder.self.v", "decoder.cross.q"))
    shuffled = jax.jit(shuffled_pool)(pool, _KEY)
    alone = jax.jit(shuffled_pool)(pool.select([2]), _KEY)
    assert shuffled.names[2] == alone.names[0] == "shuffled module_2"
    orders = {}
    for site in pool.A:
        for n in range(4):
            # NumPy's own cycle, from the same draw.
            of_name = zlib.crc32(
                f"layers of {site.partition('.')[0]}, {pool.names[n]}".encode()
            )
            cycle = np.asarray(
                jax.random.permutation(
                    jax.random.fold_in(_KEY, of_name), pool.A[site].shape[0]
                )
            )
            order = np.empty_like(cycle)
            for i, layer in enumerate(cycle):
                order[layer] = cycle[i - 1]
            assert (order != np.arange(len(order))).all()
            orders.setdefault((site.partition(".")[0], len(order)), set()).add(
                tuple(order)
            )
            for field in ("A", "B", "rank", "scaling"):
                kept = np.asarray(getattr(pool, field)[site])[:, n]
                moved = np.asarray(getattr(shuffled, field)[site])[:, n]
                np.testing.assert_array_equal(moved, kept[order])
        for field in ("A", "B", "rank", "scaling"):
            np.testing.assert_array_equal(
                getattr(shuffled, field)[site][:, [2]], getattr(alone, field)[site]
            )
    # Three layers have two cycles, and the modules do not all share one.
    assert len(orders["encoder", 3]) == 2 and len(orders["decoder", 2]) == 1
