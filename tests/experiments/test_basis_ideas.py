"""An idea for few examples, by its definition in NumPy, float64."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from lorafusion_jax.methods.fusion import Fusion
from lorafusion_jax.models.architecture import kernels
from lorafusion_jax.training.problem import Frozen

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
