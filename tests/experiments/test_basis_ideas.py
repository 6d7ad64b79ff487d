"""Ideas for a fusion in a basis, by their definitions in NumPy, float64."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from lorafusion_jax.adapters.basis import shared_basis
from lorafusion_jax.adapters.norms import column_norms
from lorafusion_jax.methods.fusion import Fusion
from lorafusion_jax.models.architecture import kernels
from lorafusion_jax.training.loss import batch_logits
from lorafusion_jax.training.problem import Frozen, Problem

_INDEX, _KEY = jnp.array([2, 0, 1]), jax.random.key(0)
_MODEL = tiny.t5()
_GRAPH, _BASE = nnx.split(_MODEL)


@pytest.fixture(scope="module")
def scripts():
    """The folder of the experiments, whose scripts import each other as if from there."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
    yield importlib.import_module
    sys.path.pop(0)


def _prepared(method, pool):
    return method.prepare(Frozen(_BASE, pool), kernels(_MODEL))


def _moved(vectors):
    return jax.tree.map(lambda v: v + jnp.cos(jnp.arange(v.size, dtype=jnp.float32)).reshape(v.shape) / 2, vectors)


def test_vectors_scale_directions_and_columns(scripts):
    ideas, basis = scripts("_basis_ideas"), shared_basis(tiny.pool(3), 5)
    alone, around = ideas.Vectors(basis=4), ideas.FusionWithVectors(basis=4)
    frozen, whole = _prepared(alone, basis), _prepared(around, basis)
    params = alone.init(frozen, _INDEX, _KEY)
    assert all(not jnp.any(adapter.B) for adapter in alone.adapters(params, frozen, _INDEX)[0].values())
    fused = around.init(whole, _INDEX, _KEY)
    plain = Fusion(basis=4).adapters({g: fused[g] for g in ("coefficients", "magnitudes")}, whole, _INDEX)[0]
    for site, adapter in around.adapters(fused, whole, _INDEX)[0].items():
        np.testing.assert_allclose(adapter.B, plain[site].B, atol=1e-6)
        np.testing.assert_allclose(adapter.scale, plain[site].scale, rtol=1e-6)
    params, fused = ({**of, "vera": _moved(of["vera"])} for of in (params, fused))
    norms = column_norms(whole.gram)
    for site, adapter in around.adapters(fused, whole, _INDEX)[0].items():
        (U, V), S = (np.asarray(of[site], float) for of in (whole.pool.U, whole.pool.V)), whole.pool.S[site]
        d, b = (np.asarray(fused["vera"][name][site], float) for name in "db")
        mixed = np.asarray(S, float)[:, np.asarray(_INDEX)].mean(axis=1)
        delta = (U * d[:, None]) @ mixed @ (V * b[:, None])
        np.testing.assert_allclose(adapter.A @ adapter.B, delta, atol=1e-5)
        norm = np.linalg.norm(np.asarray(kernels(_MODEL)[site], float) + delta, axis=1)
        np.testing.assert_allclose(adapter.scale, norms[site] / norm, rtol=1e-4)
        own = alone.adapters(params, frozen, _INDEX)[0][site]
        d, b = (np.asarray(params["vera"][name][site], float) for name in "db")
        np.testing.assert_allclose(own.A @ own.B, (U * d[:, None]) @ (V * b[:, None]), atol=1e-5)


@pytest.mark.long
def test_whitened_numbers_measure_the_distance_from_the_mean_module(scripts):
    ideas = scripts("_basis_ideas")
    pool, plain, whitened = tiny.pool(4), Fusion(magnitudes=False), ideas.Whitened(magnitudes=False)
    frozen, index = _prepared(whitened, pool), np.asarray(_INDEX)
    z = whitened.init(frozen, _INDEX, _KEY)["coefficients"]
    assert not jnp.any(z)
    z = z + tiny.coefficients(z.shape)
    c = np.empty(z.shape)
    # Modules of a block as vectors; blocks are the encoder's layers, then the decoder's.
    blocks = [(stack, layer) for stack, depth in (("encoder", 3), ("decoder", 2)) for layer in range(depth)]
    for number, (stack, layer) in enumerate(blocks):
        of_modules = np.concatenate(
            [
                np.asarray(pool.A[s][layer], float)[index] @ np.asarray(pool.B[s][layer], float)[index]
                for s in pool.rank
                if s.startswith(stack)
            ],
            axis=1,
        ).reshape(len(index), -1)
        G = of_modules @ of_modules.T
        G = 0.9 * G / (np.trace(G) / len(index)) + 0.1 * np.eye(len(index))
        values, vectors = np.linalg.eigh(G)
        c[:, number] = 1 / len(index) + vectors @ np.diag(values**-0.5) @ vectors.T @ np.asarray(z[:, number], float)
        away = c[:, number] - 1 / len(index)
        assert away @ G @ away == pytest.approx(float(np.sum(np.square(z[:, number]))), rel=1e-5)
    found, _ = whitened.adapters({"coefficients": z}, frozen, _INDEX)
    wanted, _ = plain.adapters({"coefficients": jnp.asarray(c, jnp.float32)}, frozen, _INDEX)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_chips_disagree_by_the_divergence_of_their_tokens(scripts):
    disagreement = scripts("chip_consistency").disagreement
    frozen, method, batch = tiny.frozen(_MODEL), Fusion(magnitudes=False), tiny.batch()
    here = Problem(graph=_GRAPH, method=method, frozen=frozen, index=_INDEX)
    there = here.replace(index=_INDEX[::-1])
    params = {"coefficients": tiny.coefficients((3, 5))}
    p, q = (
        np.asarray(jax.nn.softmax(jax.jit(batch_logits)(params, batch, of)[0].astype(jnp.float32)), float)
        for of in (here, there)
    )
    real = np.asarray(batch.labels) >= 0
    wanted = ((p * np.log(p / q)).sum(axis=2) + (q * np.log(q / p)).sum(axis=2))[real].mean() / 2
    assert float(jax.jit(disagreement)(params, batch, here, there)) == pytest.approx(wanted, rel=1e-3)
    assert wanted > 1e-3
