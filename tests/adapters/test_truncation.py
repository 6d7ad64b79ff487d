"""Differences of adapted and base matrices at a low rank, against the dense SVD of NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.adapters.truncation import factors_of, truncated
from lorafusion_jax.adapters.updates import Dense, LowRank, Modules, Outputs, Rescaled

_LAYERS = 2
_IN = 60
_OUT = 50
_RANK = 4
_KERNEL = jax.random.normal(jax.random.key(0), (_LAYERS, _IN, _OUT)) / 8
_A = jax.random.normal(jax.random.key(1), (_LAYERS, 3, _IN, 2)) / 8
_B = jax.random.normal(jax.random.key(2), (_LAYERS, 3, 2, _OUT)) / 8
_UPDATE = jax.random.normal(jax.random.key(3), (_LAYERS, _IN, _OUT)) / 8
_SCALE = 1 + jax.random.normal(jax.random.key(9), (_LAYERS, _OUT)) / 4
_INDEX = jnp.tile(jnp.array([2, 0, 1]), (_LAYERS, 1))
_WEIGHTS = jnp.full((_LAYERS, 3, 1), 0.7)
_UPDATES = {
    "a mix": LowRank(_A[:, 0], _B[:, 0]),
    "a sum": Modules(_A, _B, _INDEX, _WEIGHTS),
    "a mix with magnitudes": LowRank(_A[:, 0], _B[:, 0], _SCALE),
    "a sum with magnitudes": Modules(_A, _B, _INDEX, _WEIGHTS, _SCALE),
    "a wide sum": Dense(_UPDATE),
    "a wide sum with magnitudes": Dense(_UPDATE, _SCALE),
    "magnitudes": Rescaled(_SCALE),
}


def _truncated(update, rank, **how):
    return truncated(jax.jit(factors_of)({"q": update})["q"], _KERNEL, rank, **how)


def _matrices(update):
    unit = jnp.eye(_IN)
    return np.asarray(
        jax.lax.map(lambda layer: layer[0](unit, layer[1]), (update, _KERNEL)),
        np.float64,
    )


@pytest.mark.parametrize("rank", [_RANK, _OUT])
@pytest.mark.parametrize("update", _UPDATES.values(), ids=_UPDATES)
def test_it_is_the_nearest_matrix_of_its_rank(update, rank):
    difference = _matrices(update) - np.asarray(_KERNEL, np.float64)
    singular = np.square(np.linalg.svd(difference, compute_uv=False))
    least = singular[:, rank:].sum()
    whole = singular.sum()
    found = _truncated(update, rank)
    error = np.sum(np.square(difference - found.A @ found.B))
    assert least - 1e-6 * whole <= error <= 1.01 * least + 1e-6 * whole
    assert found.left_out == pytest.approx(error / whole, abs=1e-5)
    np.testing.assert_allclose(
        found.norms, np.linalg.norm(_matrices(update), axis=1), rtol=1e-4
    )
    # The roots of the singular values are in both factors.
    np.testing.assert_allclose(
        np.sum(found.A**2, axis=1), np.sum(found.B**2, axis=2), rtol=1e-3, atol=1e-6
    )


def test_ranks_that_an_update_lacks_are_zero():
    found = _truncated(_UPDATES["a mix"], _RANK)
    assert (
        not found.A[:, :, 2:].any()
        and not found.B[:, 2:].any()
        and found.A[:, :, :2].any(axis=1).all()
    )
    empty = _truncated(Rescaled(jnp.ones((_LAYERS, _OUT))), _RANK)
    assert not empty.A.any() and empty.left_out == 0


def test_scales_can_be_left_to_the_magnitudes():
    """The factors are those of the update alone, and the norms contain the scales."""
    found = _truncated(_UPDATES["a sum with magnitudes"], 6, rescaled=False)
    plain = _truncated(_UPDATES["a sum"], 6)
    np.testing.assert_allclose(found.A @ found.B, plain.A @ plain.B, atol=1e-6)
    np.testing.assert_allclose(found.norms, plain.norms * _SCALE, rtol=1e-5)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (LowRank(_A[:, 0] * jnp.nan, _B[:, 0]), "numbers that are not finite"),
        (
            Outputs(_A, _B, _INDEX, _WEIGHTS, "sum"),
            "an update of the kind Outputs has no factors",
        ),
    ],
)
def test_updates_without_a_start_are_refused(update, message):
    with pytest.raises(ValueError, match=message):
        _truncated(update, _RANK)
