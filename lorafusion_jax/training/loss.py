"""The training loss: token cross-entropy, and the terms that an objective adds to it.

Axis letters: B batch, T target, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..models.layers import widened
from ..tasks.batches import IGNORED, Batch
from .method import Metrics, Params
from .problem import Problem, per_seed


def cross_entropy(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Return the mean cross-entropy in nats over the tokens whose label is not -100, in float32 or wider."""
    total = jnp.sum(log_likelihood(logits, labels))
    return -total / jnp.maximum(jnp.sum(labels != IGNORED), 1).astype(total.dtype)


def log_likelihood(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> Float[Array, " B"]:
    """Return the log-probability of every row's labels other than -100, in nats, in float32 or wider."""
    real = labels != IGNORED
    exact = widened(logits)
    picked = jnp.take_along_axis(exact, jnp.where(real, labels, 0)[:, :, None], axis=-1)
    # As `log_softmax`, whose other log-probabilities would take two more arrays of the size of the logits.
    top = jax.lax.stop_gradient(jnp.max(exact, axis=-1, keepdims=True))
    log_probs = (
        picked - top - jnp.log(jnp.sum(jnp.exp(exact - top), axis=-1, keepdims=True))
    )
    return jnp.sum(jnp.where(real, log_probs[:, :, 0], 0.0), axis=1)


def objective(
    params: Params, batch: Batch, problem: Problem
) -> tuple[Float[Array, ""], Metrics]:
    """Return the training objective of one seed and its parts.

    Mean token cross-entropy over the number of rows (the paper's code), plus the method's penalty.
    """
    logits, metrics = batch_logits(params, batch, problem)
    entropy = cross_entropy(logits, batch.labels)
    loss = entropy / jnp.maximum(jnp.sum(batch.row_mask), 1).astype(entropy.dtype)
    penalty = problem.method.penalty(params, problem.frozen, problem.index)
    return loss + penalty, {
        "loss": loss,
        "cross_entropy": entropy,
        "penalty": penalty,
        **metrics,
    }


def batch_logits(
    params: Params, batch: Batch, problem: Problem
) -> tuple[Float[Array, "B T V"], Metrics]:
    """Return the logits of teacher forcing, and the method's metrics."""
    model, adapters, metrics = problem.adapted_model(params)
    return model.label_logits(
        batch.input_ids, batch.input_mask, batch.labels, adapters, batch.rows
    ), metrics


@per_seed
def seed_entropies(params: Params, batch: Batch, problem: Problem) -> Float[Array, ""]:
    """Return the mean cross-entropy on a batch, in nats per token."""
    return objective(params, batch, problem)[1]["cross_entropy"]


@per_seed
def seed_scores(
    params: Params, batch: Batch, problem: Problem
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Return the log-likelihood of every row's labels, in nats, and whether each label is the likeliest token."""
    logits, _ = batch_logits(params, batch, problem)
    labels = jnp.asarray(batch.labels)
    likeliest = (jnp.argmax(logits, axis=-1) == labels) | (labels == IGNORED)
    return log_likelihood(logits, labels), jnp.all(likeliest, axis=1)
