"""Digests of tensors: of names, shapes, dtypes and bytes; of a basis its directions as well."""

import numpy as np
import pytest
import tiny

from lorafusion_jax.adapters.basis import directions, in_directions
from lorafusion_jax.io.digests import pool_digests, tensor_digest

_TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.float32([0, 1]),
    "c": np.array(2, np.float32),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"a": _TENSORS["a"] + 1},
        {"a": _TENSORS["a"].reshape(3, 2)},
        {"a": _TENSORS["a"].view(np.int32)},
        {"d": _TENSORS["b"]},
    ],
)
def test_numbers_shapes_dtypes_and_names_make_a_difference(changes):
    assert tensor_digest(_TENSORS | changes) != tensor_digest(_TENSORS)


def test_a_basis_has_a_digest_of_its_directions_and_of_each_module():
    pool = tiny.pool(3)
    basis = in_directions(pool, directions(pool, 2))
    found = pool_digests(basis)
    assert pool_digests(basis.select(pool.names[1:])).basis == found.basis
    assert len({found.basis, *found.modules.values()}) == 4
    other = in_directions(pool, directions(pool.select(pool.names[:2]), 2))
    assert pool_digests(other).basis != found.basis
