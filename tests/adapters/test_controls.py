"""Pools that replace a pool's content: random, rotated and shuffled modules. Oracles in NumPy."""

import re
from dataclasses import replace

import jax
import numpy as np
import tiny
from numpy.testing import assert_array_equal

import lorafusion_jax as lf

_KEY = jax.random.key(0)
_POOL = tiny.pool(
    3, lambda n, site, layer: (3, 6, 0 if "cross" in site else 2)[n], names="v"
)


def _close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def _products(pool, site):
    """Return the update of every module, [L, N, d_in, d_out]."""
    return np.asarray(pool.A[site], float) @ np.asarray(pool.B[site], float)


def test_random_modules_keep_norms_sites_and_ranks():
    control = jax.jit(lf.random_pool)(_POOL, _KEY)
    for field in ("A", "B"):
        for site, weight in getattr(_POOL, field).items():
            random = np.asarray(getattr(control, field)[site])
            assert_array_equal(random == 0, np.asarray(weight) == 0)
            norms = np.linalg.norm(weight, axis=(2, 3))
            _close(np.linalg.norm(random, axis=(2, 3)), norms)
            assert np.abs(random - weight).max() > 0.1
    # Zeros within a module's rank are replaced too.
    pruned = {site: a.at[:, :, 0].set(0.0) for site, a in _POOL.A.items()}
    of_pruned = lf.random_pool(replace(_POOL, A=pruned), _KEY)
    for site, a in of_pruned.A.items():
        assert_array_equal(a != 0, control.A[site] != 0)


def test_a_random_module_depends_on_matrix_site_layer_and_key_alone():
    control = lf.random_pool(_POOL, _KEY)
    other = lf.random_pool(_POOL, jax.random.key(1))
    # Not on other modules, nor on how they pad it.
    alone = _POOL.select([2])
    A = {site: a[..., :2] for site, a in alone.A.items()}
    B = {site: b[:, :, :2] for site, b in alone.B.items()}
    drawn = lf.random_pool(replace(alone, A=A, B=B), _KEY)
    for site in _POOL.A:
        assert np.abs(other.A[site] - control.A[site]).max() > 0.1
        assert_array_equal(control.A[site][:, [2], :, :2], drawn.A[site])
        assert_array_equal(control.B[site][:, [2], :2], drawn.B[site])
    even = jax.jit(lf.random_pool)(tiny.pool(2, names="v"), _KEY)
    first = [
        factors[site][layer, 0].ravel()[:40]
        for factors in (even.A, even.B)
        for site in even.A
        for layer in (0, 1)
    ]
    assert np.abs(np.corrcoef(first) - np.eye(len(first))).max() < 0.7


def test_rotated_modules_keep_spectra_and_turn_singular_vectors():
    control = lf.rotated_pool(_POOL, _KEY)
    other = lf.rotated_pool(_POOL, jax.random.key(1))
    alone = lf.rotated_pool(_POOL.select([2]), _KEY)
    for site in _POOL.A:
        before = _products(_POOL, site)
        after = _products(control, site)
        spectra = np.linalg.svd(before, compute_uv=False)
        _close(np.linalg.svd(after, compute_uv=False), spectra)
        least = 0.1 * np.abs(before).max()
        assert np.abs(after - before).max() > least
        assert np.abs(after - _products(other, site)).max() > least
        inner = np.einsum("lnij,lmij->lnm", before, before)
        turned = np.einsum("lnij,lmij->lnm", after, after)
        assert not np.allclose(turned, inner, atol=1e-4 * np.abs(inner).max())
        # A rotation depends on its own module alone.
        _close(_products(alone, site)[:, 0], after[:, 2])


def test_a_compiled_rotation_factors_one_matrix_at_a_time():
    """Batched factorisations of one compiled function wait for each other for ever on two cores."""
    text = str(jax.make_jaxpr(lf.rotated_pool)(_POOL, _KEY))
    factored = re.findall(r"f32\[([\d,]+)\] = qr\[", text)
    assert factored and all(shape.count(",") == 1 for shape in factored)


def test_shuffled_modules_have_the_layers_of_others():
    """Each module and stack moves all of its layers, in one of the cycles, at all sites alike."""
    pool = tiny.pool(6, names="qv")
    # The scaling is the number of the layer.
    numbers = {
        site: np.broadcast_to(np.arange(len(rank), dtype=float)[:, None], rank.shape)
        for site, rank in pool.rank.items()
    }
    pool = replace(pool, scaling=jax.tree.map(jax.numpy.asarray, numbers))
    shuffled = jax.jit(lf.shuffled_pool)(pool, _KEY)
    alone = jax.jit(lf.shuffled_pool)(pool.select([2]), _KEY)
    assert shuffled.names[2] == alone.names[0] == "shuffled module_2"
    orders = {}
    for site, layers in numbers.items():
        order = np.asarray(shuffled.scaling[site], int)
        assert_array_equal(np.sort(order, axis=0), layers)
        assert not (order == layers).any()
        for field in ("A", "B", "rank"):
            kept = np.asarray(getattr(pool, field)[site])[order, np.arange(6)]
            assert_array_equal(getattr(shuffled, field)[site], kept)
        assert_array_equal(shuffled.A[site][:, [2]], alone.A[site])
        first = orders.setdefault(site.partition(".")[0], order)
        assert_array_equal(order, first)
    # Three layers have two cycles, and the modules do not all share one.
    assert len(np.unique(orders["encoder"], axis=1).T) == 2
