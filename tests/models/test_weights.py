"""Products in bfloat16, whose gradients are written out: against NumPy, under jit and vmap."""

import jax
import jax.numpy as jnp
import numpy as np

from lorafusion_jax.models.weights import matmul


def test_bfloat16_products_and_their_gradients():
    rng = np.random.default_rng(0)
    # Small integers: exact in bfloat16, and so are their sums.
    x, w, g = (rng.integers(-3, 4, shape) for shape in ((2, 3, 5), (5, 4), (2, 3, 4)))
    given = [jnp.asarray(a, jnp.bfloat16) for a in (x, w, g)]

    def product(x, w, g):
        y, back = jax.vjp(matmul, x, w)
        return y, *back(g)

    found = jax.jit(product)(*given)
    for ours, wanted in zip(found, (x @ w, g @ w.T, np.einsum("bti,bto->io", x, g)), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(ours, np.float64), wanted)
    mapped = jax.vmap(product, in_axes=(0, None, 0))(*given)
    np.testing.assert_array_equal(np.asarray(mapped[0], np.float64), x @ w)
    np.testing.assert_array_equal(np.asarray(mapped[1], np.float64), g @ w.T)
    np.testing.assert_array_equal(np.asarray(mapped[2], np.float64), np.einsum("bti,bto->bio", x, g))
