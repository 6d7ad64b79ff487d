"""Differences of adapted and base matrices at a low rank, against the dense SVD of NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose
from refusals import refused

from lorafusion_jax.adapters.truncation import factors_of, truncated
from lorafusion_jax.adapters.updates import Dense, LowRank, Modules, Outputs, Rescaled


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / 8


_KERNEL = _normal(0, 2, 60, 50)
_A = _normal(1, 2, 3, 60, 2)
_B = _normal(2, 2, 3, 2, 50)
_UPDATE = _normal(3, 2, 60, 50)
_SCALE = 1 + jax.random.normal(jax.random.key(9), (2, 50)) / 4
_INDEX = jnp.tile(jnp.array([2, 0, 1]), (2, 1))
_WEIGHTS = jnp.full((2, 3, 1), 0.7)
_UPDATES = {
    "a mix": LowRank(_A[:, 0], _B[:, 0]),
    "a sum": Modules(_A, _B, _INDEX, _WEIGHTS),
    "a mix with magnitudes": LowRank(_A[:, 0], _B[:, 0], _SCALE),
    "a sum with magnitudes": Modules(_A, _B, _INDEX, _WEIGHTS, _SCALE),
    "a wide sum": Dense(_UPDATE),
    "a wide sum with magnitudes": Dense(_UPDATE, _SCALE),
    "magnitudes": Rescaled(_SCALE),
}


def _truncated(update, rank, *, rescaled=True):
    factors = jax.jit(factors_of)({"q": update})["q"]
    return truncated(factors, _KERNEL, rank, rescaled=rescaled)


@pytest.mark.parametrize("rank", [4, 50])
@pytest.mark.parametrize("update", _UPDATES.values(), ids=_UPDATES)
def test_it_is_the_nearest_matrix_of_its_rank(update, rank):
    matrices = np.asarray(tiny.matrices({"q": update}, {"q": _KERNEL})["q"], np.float64)
    difference = matrices - np.asarray(_KERNEL, np.float64)
    squares = np.square(np.linalg.svd(difference, compute_uv=False))
    least = squares[:, rank:].sum()
    total = squares.sum()
    found = _truncated(update, rank)
    error = np.sum(np.square(difference - found.A @ found.B))
    assert least - 1e-6 * total <= error <= 1.01 * least + 1e-6 * total
    assert found.left_out == pytest.approx(error / total, abs=1e-5)
    assert_allclose(found.norms, np.linalg.norm(matrices, axis=1), rtol=1e-4)
    # The roots of the singular values are in both factors.
    lengths = np.sum(found.B**2, axis=2)
    assert_allclose(np.sum(found.A**2, axis=1), lengths, rtol=1e-3, atol=1e-6)


def test_ranks_that_an_update_lacks_are_zero():
    found = _truncated(_UPDATES["a mix"], 4)
    assert not found.A[:, :, 2:].any() and not found.B[:, 2:].any()
    assert found.A[:, :, :2].any(axis=1).all()
    empty = _truncated(Rescaled(jnp.ones((2, 50))), 4)
    assert not empty.A.any() and empty.left_out == 0


def test_scales_can_be_left_to_the_magnitudes():
    """The factors are those of the update alone, and the norms contain the scales."""
    found = _truncated(_UPDATES["a sum with magnitudes"], 6, rescaled=False)
    plain = _truncated(_UPDATES["a sum"], 6)
    assert_allclose(found.A @ found.B, plain.A @ plain.B, atol=1e-6)
    assert_allclose(found.norms, plain.norms * _SCALE, rtol=1e-5)


def test_updates_without_a_start_are_refused():
    with refused("numbers that are not finite"):
        _truncated(LowRank(_A[:, 0] * jnp.nan, _B[:, 0]), 4)
    with refused("of the kind Outputs has no factors"):
        _truncated(Outputs(_A, _B, _INDEX, _WEIGHTS, "sum"), 4)
