"""Host buffers: JAX adopts them on CPU, and the blocked transposition is a transposition."""

import jax
import ml_dtypes
import numpy as np
import pytest

from lorafusion_jax.io.hf import aligned_zeros, copy_transposed


def test_jax_uses_zeros_in_place():
    array = aligned_zeros((100, 1000), np.float32)
    assert (
        jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
        and not array.any()
    )


@pytest.mark.parametrize("shape", [(1, 1), (15, 5), (37, 33)])
def test_copy_transposed(shape):
    matrix = np.random.default_rng(0).standard_normal(shape, np.float32)
    out = np.empty(shape[::-1], ml_dtypes.bfloat16)
    copy_transposed(matrix, out)
    np.testing.assert_array_equal(out, matrix.T.astype(ml_dtypes.bfloat16))
