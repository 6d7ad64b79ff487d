"""A shared basis by its definition: eigenvectors, projections and fused matrices in NumPy, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from numpy.testing import assert_allclose

import lorafusion_jax as lf
from lorafusion_jax.adapters import expand
from lorafusion_jax.adapters.basis import in_directions, random_directions
from lorafusion_jax.adapters.coefficients import shape
from lorafusion_jax.adapters.composition import compose_in_basis
from lorafusion_jax.adapters.updates import InBasis

_MODEL = tiny.t5()
_KERNELS = lf.kernels(_MODEL)
_INDEX = [3, 0, 2]  # of a pool of four
_close = functools.partial(assert_allclose, rtol=1e-5, atol=1e-5)


def _deltas(pool, site, layer):
    A = np.asarray(pool.A[site][layer], float)
    return A @ np.asarray(pool.B[site][layer], float)


def _frozen(method, pool):
    return method.precompute(lf.Frozen(nnx.state(_MODEL), pool), _KERNELS)


@functools.partial(jax.jit, static_argnames="granularity")
def _fuse(c, basis, granularity, **more):
    spread = expand(c, basis, granularity)
    return compose_in_basis(basis, jnp.array(_INDEX), spread, **more)


# 8 columns next to each other are fewer than 16 rows, 36 are more.
@pytest.mark.parametrize("modules", [2, 9])
def test_directions_are_the_leading_eigenvectors(modules):
    pool = tiny.pool(modules, lambda n, site, layer: (n + layer) % 4 + 1)
    basis = lf.shared_basis(pool, 3)
    assert (len(basis), basis.k, basis.sites) == (modules, 3, pool.sites)
    for site in pool.rank:
        for layer in range(len(pool.rank[site])):
            deltas = _deltas(pool, site, layer)
            transposed = deltas.swapaxes(1, 2)
            U = np.asarray(basis.U[site][layer])
            V = np.asarray(basis.V[site][layer])
            for found, squares in (
                (U, deltas @ transposed),
                (V.T, transposed @ deltas),
            ):
                leading = np.linalg.eigh(squares.sum(axis=0))[1][:, -3:]
                _close(found @ found.T, leading @ leading.T)
                _close(found.T @ found, np.eye(3))
                largest = np.abs(found).argmax(axis=0)
                assert (found[largest, range(3)] > 0).all()
            _close(basis.S[site][layer], U.T @ deltas @ V.T)
            _close(basis.energy[site][layer], (deltas**2).sum(axis=(1, 2)))


def test_the_first_directions_are_the_smaller_basis_and_keep_less():
    pool = tiny.pool(4)
    large = lf.shared_basis(pool, 6)
    small = lf.shared_basis(pool, 2)
    for a, b in zip(*map(jax.tree.leaves, (large.first(2), small)), strict=True):
        _close(a, b)
    for site, share in large.kept().items():
        assert (small.kept()[site] < share).all() and (share < 1).all()
    all_ranks = lf.shared_basis(tiny.pool(3), 12)
    for share in all_ranks.kept().values():
        _close(share, 1)


@pytest.mark.parametrize("granularity", ["global", "block", "site"])
def test_adapters_are_the_definition(granularity):
    pool = tiny.pool(4, tiny.somewhere)
    basis = lf.shared_basis(pool, 5)
    c = tiny.coefficients(shape(basis, len(_INDEX), granularity))
    coefficient = tiny.coefficient_of(c, pool, granularity)
    terms = tiny.frozen(_MODEL, basis).gram
    magnitudes = {site: 2.0 * norm for site, norm in lf.column_norms(terms).items()}
    adapters, floored = _fuse(c, basis, granularity, gram=terms, magnitudes=magnitudes)
    assert adapters.keys() == pool.A.keys() and floored == 0
    for site, matrices in tiny.matrices(adapters, _KERNELS).items():
        for layer, matrix in enumerate(matrices):
            U = np.asarray(basis.U[site][layer], float)
            V = np.asarray(basis.V[site][layer], float)
            deltas = _deltas(pool, site, layer)
            inner = sum(
                coefficient(n, site, layer) * U.T @ deltas[i] @ V.T
                for n, i in enumerate(_INDEX)
            )
            W = np.asarray(_KERNELS[site][layer], float)
            wanted = W + U @ inner @ V
            lengths = np.linalg.norm(W, axis=0) / np.linalg.norm(wanted, axis=0)
            _close(matrix, 2 * lengths * wanted, rtol=1e-4)
    # In arrays the basis and the core stay apart.
    without_core, _ = _fuse(c, basis, granularity)
    spread = expand(c, basis, granularity)
    in_basis = {
        site: InBasis(
            basis.U[site],
            basis.V[site],
            jnp.einsum("lnz,lnij->lij", spread[site], s[:, jnp.array(_INDEX)]),
        )
        for site, s in basis.S.items()
    }
    jax.tree.map(
        _close,
        tiny.matrices(in_basis, _KERNELS),
        tiny.matrices(without_core, _KERNELS),
    )


def test_a_basis_of_the_pools_whole_rank_is_the_fusion_of_whole_modules():
    """Loss, gradients and counts: a method on the basis is the method on the modules."""
    pool = tiny.pool(3, tiny.somewhere)
    method = lf.Fusion()
    index = jnp.array([2, 0, 1])
    of_modules = _frozen(method, pool)
    in_basis = _frozen(method, lf.shared_basis(pool, 12))
    start = method.init(of_modules, index, jax.random.key(0))
    params = jax.tree.map(lambda p: 1.1 * p, start)
    assert jax.tree.map(
        jnp.shape, method.init(in_basis, index, jax.random.key(0))
    ) == jax.tree.map(jnp.shape, params)
    jax.tree.map(
        np.testing.assert_array_equal,
        method.trainable(params, in_basis, index),
        method.trainable(params, of_modules, index),
    )

    @jax.jit
    @jax.value_and_grad
    def loss(params, frozen):
        adapters, _ = method.adapters(params, frozen, index)
        matrices = tiny.matrices(adapters, _KERNELS)
        return sum(jnp.sum(jnp.sin(matrix)) for matrix in matrices.values())

    jax.tree.map(
        functools.partial(assert_allclose, rtol=1e-3, atol=1e-4),
        loss(params, in_basis),
        loss(params, of_modules),
    )


def test_quantised_directions_have_the_norms_of_what_they_are():
    basis = lf.shared_basis(tiny.pool(4), 8).quantised("int8")
    for site, U in basis.U.items():  # one scale for each direction
        assert U.scale.shape == (len(U.qvalue), 1, 8)
        assert basis.V[site].scale.shape == (len(U.qvalue), 8, 1)
    c = tiny.coefficients(shape(basis, len(_INDEX), "block"))
    terms = tiny.frozen(_MODEL, basis).gram
    norms = lf.column_norms(terms)
    adapters, _ = _fuse(c, basis, "block", gram=terms, magnitudes=norms)
    for site, matrices in tiny.matrices(adapters, _KERNELS).items():
        _close(np.linalg.norm(matrices, axis=1), norms[site])


def test_random_directions_are_orthonormal_and_keep_less():
    pool = tiny.pool(4)
    pool_basis = lf.shared_basis(pool, 4)
    random = random_directions(pool, 4, jax.random.key(0))
    control = in_directions(pool, random)
    for site in pool.rank:
        U = np.asarray(control.U[site][1])
        V = np.asarray(control.V[site][1])
        _close(U.T @ U, np.eye(4))
        _close(V @ V.T, np.eye(4))
        assert control.kept()[site].mean() < pool_basis.kept()[site].mean()
    # Every site, and each of its sides, draws its own.
    firsts = [u[0, :12, 0] for u in random[0].values()]
    firsts += [v[0, 0, :12] for v in random[1].values()]
    assert np.abs(np.corrcoef(firsts) - np.eye(len(firsts))).max() < 0.95
