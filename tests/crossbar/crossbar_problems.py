"""Small matrices and their inputs."""

import jax
import jax.numpy as jnp
import numpy as np


def problem(
    d_in: int = 30, d_out: int = 9, batch: int = 4, *, seed: int = 0, low: float = -1.0
) -> tuple[jax.Array, jax.Array]:
    """Return normal weights, and inputs that are spread evenly from `low` to 1."""
    rng = np.random.default_rng(seed)
    W, x = rng.normal(size=(d_in, d_out)), rng.uniform(low, 1, (batch, d_in))
    return jnp.asarray(W, jnp.float32), jnp.asarray(x, jnp.float32)
