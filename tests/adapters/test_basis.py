"""A shared basis by its definition: eigenvectors, projections and fused matrices in NumPy, float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.adapters import expand
from lorafusion_jax.adapters.basis import (
    directions,
    in_directions,
    random_directions,
)
from lorafusion_jax.adapters.coefficients import shape
from lorafusion_jax.adapters.composition import compose_in_basis
from lorafusion_jax.adapters.updates import InBasis

_MODEL = tiny.t5()
_KERNELS = lf.kernels(_MODEL)
_INDEX = [3, 0, 2]  # of a pool of four


def _shallow(pool):
    """The first layer of every stack."""
    first = {
        field: {s: w[:1] for s, w in getattr(pool, field).items()}
        for field in ("A", "B", "rank")
    }
    return dataclasses.replace(pool, **first)


def _deltas(pool, site, layer):
    return np.asarray(pool.A[site][layer], float) @ np.asarray(
        pool.B[site][layer], float
    )


def _frozen(method, pool):
    return method.precompute(lf.Frozen(nnx.state(_MODEL), pool), _KERNELS)


def _gram(basis):
    return jax.jit(lf.gram)(basis, {site: _KERNELS[site] for site in basis.U})


@functools.partial(jax.jit, static_argnames=("granularity",))
def _fuse(c, basis, granularity, gram=None, magnitudes=None):
    spread = expand(c, basis, granularity)
    return compose_in_basis(
        basis, jnp.array(_INDEX), spread, gram=gram, magnitudes=magnitudes
    )


def _matrix(adapter, site, layer):
    """What an adapted linear map multiplies by."""
    of_layer = jax.tree.map(lambda a: a[layer], adapter)
    kernel = _KERNELS[site][layer]
    return np.asarray(of_layer(jnp.eye(kernel.shape[0]), kernel))


@pytest.mark.parametrize(
    "modules", [2, 9]
)  # 8 columns side by side are fewer than 16 rows, 36 are more
def test_directions_are_the_leading_eigenvectors(modules):
    pool = tiny.pool(modules, lambda n, site, layer: (n + layer) % 4 + 1)
    basis = lf.shared_basis(pool, 3)
    assert (len(basis), basis.k, basis.sites) == (modules, 3, pool.sites)
    for site in pool.rank:
        for layer in range(len(pool.rank[site])):
            deltas = _deltas(pool, site, layer)
            U = np.asarray(basis.U[site][layer])
            V = np.asarray(basis.V[site][layer])
            for found, squares in (
                (U, deltas @ deltas.swapaxes(1, 2)),
                (V.T, deltas.swapaxes(1, 2) @ deltas),
            ):
                leading = np.linalg.eigh(squares.sum(axis=0))[1][:, -3:]
                np.testing.assert_allclose(
                    found @ found.T, leading @ leading.T, atol=1e-5
                )
                np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-6)
                assert (
                    np.take_along_axis(
                        found, np.abs(found).argmax(axis=0)[None], axis=0
                    )
                    > 0
                ).all()
            np.testing.assert_allclose(
                basis.S[site][layer], U.T @ deltas @ V.T, atol=1e-5
            )
            np.testing.assert_allclose(
                basis.energy[site][layer], (deltas**2).sum(axis=(1, 2)), rtol=1e-5
            )


def test_the_first_directions_are_the_smaller_basis_and_keep_less():
    pool = tiny.pool(4)
    large = lf.shared_basis(pool, 6)
    small = lf.shared_basis(pool, 2)
    for got, wanted in zip(
        jax.tree.leaves(large.first(2)), jax.tree.leaves(small), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    for site, kept in large.kept().items():
        assert (small.kept()[site] < kept).all() and (kept < 1).all()
    whole = lf.shared_basis(tiny.pool(3), 12)  # the rank of all modules together
    for kept in whole.kept().values():
        np.testing.assert_allclose(kept, 1, atol=1e-5)


@pytest.mark.parametrize("granularity", ["global", "block", "site"])
def test_adapters_are_the_definition(granularity):
    pool = tiny.pool(4, tiny.somewhere)
    basis = lf.shared_basis(pool, 5)
    c = tiny.coefficients(shape(basis, len(_INDEX), granularity))
    of_module = tiny.coefficient_of(c, pool, granularity)
    terms = _gram(basis)
    magnitudes = {site: 2.0 * norm for site, norm in lf.column_norms(terms).items()}
    adapters, floored = _fuse(c, basis, granularity, terms, magnitudes)
    assert adapters.keys() == pool.A.keys() and floored == 0
    for site, adapter in adapters.items():
        assert isinstance(adapter, lf.LowRank)
        for layer in range(len(pool.rank[site])):
            U = np.asarray(basis.U[site][layer], float)
            V = np.asarray(basis.V[site][layer], float)
            deltas = _deltas(pool, site, layer)
            inside = sum(
                of_module(n, site, layer) * U.T @ deltas[i] @ V.T
                for n, i in enumerate(_INDEX)
            )
            W = np.asarray(_KERNELS[site][layer], float)
            adapted = W + U @ inside @ V
            wanted = (
                2
                * np.linalg.norm(W, axis=0)
                * adapted
                / np.linalg.norm(adapted, axis=0)
            )
            np.testing.assert_allclose(
                _matrix(adapter, site, layer), wanted, rtol=1e-4, atol=1e-5
            )


def test_a_basis_of_the_pools_whole_rank_is_the_fusion_of_whole_modules():
    """Loss, gradients and counts: a method on the basis is the method on the modules."""
    pool = tiny.pool(3, tiny.somewhere)
    basis = lf.shared_basis(pool, 12)
    method = lf.Fusion()
    index = jnp.array([2, 0, 1])
    of_modules = _frozen(method, pool)
    in_basis = _frozen(method, basis)
    params = jax.tree.map(
        lambda p: 1.1 * p, method.init(of_modules, index, jax.random.key(0))
    )
    assert jax.tree.map(
        jnp.shape, method.init(in_basis, index, jax.random.key(0))
    ) == jax.tree.map(jnp.shape, params)
    for got, wanted in zip(
        *(
            jax.tree.leaves(method.trainable(params, frozen, index))
            for frozen in (in_basis, of_modules)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(got, wanted)

    @jax.jit
    def loss(params, frozen):
        adapters, _ = method.adapters(params, frozen, index)
        total = 0.0
        for number, (site, adapter) in enumerate(adapters.items()):
            x = jax.random.normal(jax.random.key(number), (3, _KERNELS[site].shape[1]))
            y = jax.vmap(lambda a, W, x=x: a(x, W))(adapter, _KERNELS[site])
            total += jnp.sum(jnp.sin(y))
        return total

    got, gradient = jax.value_and_grad(loss)(params, in_basis)
    wanted, of_whole = jax.value_and_grad(loss)(params, of_modules)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
        gradient,
        of_whole,
    )


def test_quantised_directions_have_the_norms_of_what_they_are():
    basis = lf.shared_basis(tiny.pool(4), 8).quantised("int8")
    for U, V in zip(
        basis.U.values(), basis.V.values(), strict=True
    ):  # one scale for each direction
        assert U.scale.shape == (len(U.qvalue), 1, 8) and V.scale.shape == (
            len(V.qvalue),
            8,
            1,
        )
    c = tiny.coefficients(shape(basis, len(_INDEX), "block"))
    terms = _gram(basis)
    adapters, _ = _fuse(c, basis, "block", terms, lf.column_norms(terms))
    for site, adapter in adapters.items():
        norms = np.linalg.norm(_matrix(adapter, site, 0), axis=0)
        np.testing.assert_allclose(
            norms, np.linalg.norm(_KERNELS[site][0], axis=0), rtol=1e-5
        )


def test_directions_of_controls_are_orthonormal_and_keep_less():
    pool = tiny.pool(4)
    own = lf.shared_basis(pool, 4)
    control = in_directions(pool, random_directions(pool, 4, jax.random.key(0)))
    for site in pool.rank:
        U = np.asarray(control.U[site][1])
        V = np.asarray(control.V[site][1])
        np.testing.assert_allclose(U.T @ U, np.eye(4), atol=1e-5)
        np.testing.assert_allclose(V @ V.T, np.eye(4), atol=1e-5)
        assert control.kept()[site].mean() < own.kept()[site].mean()
    # Every site, and each of its sides, draws its own.
    U, V = random_directions(pool, 4, jax.random.key(0))
    drawn = [*(u[0, :12, 0] for u in U.values()), *(v[0, 0, :12] for v in V.values())]
    assert np.abs(np.corrcoef(drawn) - np.eye(len(drawn))).max() < 0.95


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda pool: lf.shared_basis(pool, 0), "0 directions: expected at least 1"),
        (lambda pool: lf.shared_basis(pool, 13), "is 16 x 12: use at most 12"),
        (
            lambda pool: directions(pool.select([0]), 5),
            "1 modules of rank 4 .* at most 4",
        ),
        (lambda pool: lf.shared_basis(pool, 3).first(4), "has 3 directions, not 4"),
        (
            lambda pool: _frozen(lf.Fusion(basis=2), pool),
            "no shared basis: run `lorafusion convert",
        ),
        (
            lambda pool: in_directions(pool, directions(_shallow(pool), 3)),
            r"give ones for \(3, 16, 12\)",
        ),
        (
            lambda pool: lf.Fusion(basis=4, composition="mix"),
            "a shared basis lacks a mix's factors",
        ),
        (
            lambda pool: lf.Fusion(basis=4, granularity="rank"),
            "a shared basis mixes the modules' ranks",
        ),
        (
            lambda pool: _frozen(
                lf.Fusion(composition="mix"), lf.shared_basis(pool, 3)
            ),
            "lacks a mix's factors",
        ),
        (
            lambda pool: lf.shared_basis(dataclasses.replace(pool, magnitude={}), 3),
            "a DoRA adapter has magnitudes",
        ),
        (
            lambda pool: lf.shared_basis(pool.quantised("int8"), 3),
            "are QArray: give plain arrays, not quantised ones",
        ),
    ],
)
def test_bases_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(tiny.pool(4))


def test_a_basis_in_no_arrays_makes_low_rank_updates_and_in_basis_is_the_same():
    basis = lf.shared_basis(tiny.pool(4), 5)
    c = tiny.coefficients(shape(basis, len(_INDEX), "block"))
    adapters, _ = _fuse(c, basis, "block")
    for site, adapter in adapters.items():
        core = sum(
            expand(c, basis, "block")[site][:, n, :, None] * basis.S[site][:, i]
            for n, i in enumerate(_INDEX)
        )
        same = InBasis(basis.U[site], basis.V[site], core)
        np.testing.assert_allclose(
            _matrix(same, site, 0), _matrix(adapter, site, 0), atol=1e-5
        )
