"""The training loss: token cross-entropy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..tasks.batches import IGNORED


def cross_entropy(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
    """Return the mean cross-entropy in nats over the tokens whose label is not -100, in float32."""
    count = jnp.maximum(jnp.sum(labels != IGNORED), 1).astype(jnp.float32)
    return -jnp.sum(log_likelihood(logits, labels)) / count


def log_likelihood(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, " B"]:
    """Return the log-probability of every row's labels, those that are -100 left out, in nats and float32."""
    real = labels != IGNORED
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, jnp.where(real, labels, 0)[:, :, None], axis=-1)[:, :, 0]
    return jnp.sum(jnp.where(real, picked, 0.0), axis=1)


def rows(row_mask: Bool[Array, " B"]) -> Float[Array, ""]:
    """Return how many rows of a batch are really there."""
    return jnp.maximum(jnp.sum(row_mask), 1).astype(jnp.float32)
