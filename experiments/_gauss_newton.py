"""Gauss-Newton on the coefficients: steps of conjugate gradients with products only, no matrix.

With z(c) the logits of all training rows, J = dz/dc and H the Hessian of the mean token cross-entropy in z, a step
solves (J^T H J + damping) d = -gradient (Levenberg-Marquardt; Schraudolph 2002 for J^T H J, Martens 2010 for both).

Axis letters: N adapters, B batch, T target.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorafusion_jax.tasks import Batch
from lorafusion_jax.tasks.batches import IGNORED
from lorafusion_jax.training.loss import batch_logits, cross_entropy
from lorafusion_jax.training.problem import Problem

Product = Callable[[Array], Array]

_CHANGE = 4.0  # of the damping, where the quadratic model was good or bad


class Fit(NamedTuple):
    """State that steps change.

    Attributes:
      coefficients: the only trained numbers.
      damping: in nats per token and coefficient squared.
    """

    coefficients: Float[Array, "*seeds N blocks"]
    damping: Float[Array, "*seeds"]


@partial(jax.jit, static_argnames=("iterations",))
def step_seeds(
    fit: Fit,
    batch: Batch,
    problem: Problem,
    *,
    iterations: int,
) -> tuple[Fit, dict[str, Float[Array, " seeds"]]]:
    """Take one step with every seed, each on its own batch."""

    def of_seed(one: Problem, fit: Fit, batch: Batch) -> tuple[Fit, dict[str, Array]]:
        return step(fit, batch, one, iterations=iterations)

    return problem.over_seeds(of_seed, (fit, batch))


def step(fit: Fit, batch: Batch, problem: Problem, *, iterations: int) -> tuple[Fit, dict[str, Float[Array, ""]]]:
    """Take one step of one seed; one that does not lower the loss is taken back, and the damping raised.

    Returns:
      The new state, and metrics: loss before the step and after it, had it been taken.
    """

    def logits(c: Array) -> Array:
        found, _ = batch_logits({"coefficients": c}, batch, problem)
        return found.astype(jnp.float32)

    labels = jnp.asarray(batch.labels)
    z, forward = jax.linearize(logits, fit.coefficients)
    transposed = jax.linear_transpose(forward, fit.coefficients)

    def backward(cotangent: Array) -> Array:
        return transposed(cotangent)[0]

    loss, slope = jax.value_and_grad(cross_entropy)(z, labels)
    gradient = backward(slope)
    curvature = gauss_newton_product(z, labels, forward, backward)

    def damped(v: Array) -> Array:
        return curvature(v) + fit.damping * v

    change, residual = conjugate_gradients(damped, -gradient, iterations)
    # (J^T H J) change is known without another product: it is -gradient - residual - damping * change.
    predicted = -jnp.vdot(gradient, change) + 0.5 * jnp.vdot(change, gradient + residual + fit.damping * change)
    candidate = cross_entropy(logits(fit.coefficients + change), labels)
    lower = candidate < loss  # False also where it is not a number
    ratio = jnp.where(lower, (loss - candidate) / predicted, 0.0)
    factor = jnp.where(ratio > 0.75, 1 / _CHANGE, jnp.where(ratio < 0.25, _CHANGE, 1.0))
    new = Fit(jnp.where(lower, fit.coefficients + change, fit.coefficients), fit.damping * factor)
    return new, {"loss": loss, "candidate": candidate}


def gauss_newton_product(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], forward: Product, backward: Product
) -> Product:
    """Return v -> J^T H J v, with H the Hessian in the logits of the mean cross-entropy over the real tokens.

    Args:
      logits: where J was taken.
      labels: IGNORED where there is no target.
      forward: v -> J v.
      backward: u -> J^T u.
    """
    real = labels != IGNORED
    weight = (real.astype(jnp.float32) / jnp.maximum(jnp.sum(real), 1).astype(jnp.float32))[:, :, None]
    probabilities = jax.nn.softmax(logits, axis=-1)

    def product(v: Array) -> Array:
        change = forward(v)
        mean = jnp.sum(probabilities * change, axis=-1, keepdims=True)
        return backward(weight * probabilities * (change - mean))

    return product


def conjugate_gradients(product: Product, right: Array, iterations: int) -> tuple[Array, Array]:
    """Return x and the residual right - A x after `iterations` products with A, from x = 0.

    `jax.scipy.sparse.linalg.cg` spends one more product on x = 0.
    """

    def iterate(_: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        x, residual, direction = carry
        along = product(direction)
        squared = jnp.vdot(residual, residual)
        length = _ratio(squared, jnp.vdot(direction, along))
        left = residual - length * along
        return x + length * direction, left, left + _ratio(jnp.vdot(left, left), squared) * direction

    x, residual, _ = jax.lax.fori_loop(0, iterations, iterate, (jnp.zeros_like(right), right, right))
    return x, residual


def rows_of_step(rows: int, iterations: int) -> tuple[int, int]:
    """Return how many rows a step passes forward and backward.

    Forward: the logits, one product J v an iteration, the logits at the new place. Backward: the gradient, one product
    J^T u an iteration. J v is linear, its cost that of a forward pass.
    """
    return rows * (iterations + 2), rows * (iterations + 1)


def _ratio(a: Array, b: Array) -> Array:
    """Return a / b, and 0 where everything is solved already and both are."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
