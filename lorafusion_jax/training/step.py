"""The fusion step: a pure function to be jitted and mapped over seeds.

Early stopping and pruning are masks in the state, because seeds of one program may differ in them.

Axis letters: N adapters, B batch, S source, T target.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..tasks.batches import Batch
from .loss import objective
from .method import Metrics, Params
from .problem import Problem
from .recipe import Optimisation, Rates


class TrainState(NamedTuple):
    """State that training changes.

    Attributes:
      params: by group.
      adam: optax state.
      step: steps taken.
      kept: False for magnitudes that were pruned (the shape of `params["magnitudes"]`, or None).
      best: params of the best validation loss so far.
      best_loss: that loss, infinite before the first.
      waited: counted epochs since.
      stopped: once True, nothing changes any more.
    """

    params: Params
    adam: Any
    step: Int[Array, ""]
    kept: Any
    best: Params
    best_loss: Float[Array, ""]
    waited: Int[Array, ""]
    stopped: Bool[Array, ""]


def standard_promotion() -> Any:
    """Return the context for optax's own arithmetic, which strict dtype promotion refuses."""
    return jax.numpy_dtype_promotion("standard")


def init_state(
    problem: Problem, key: PRNGKeyArray, params: Params | None = None
) -> TrainState:
    """Return the state that training of one seed starts from, given the key of the method's draws.

    Arrays are copied, so the state's buffers can be donated. `params` are groups of parameters to start from, instead
    of the method's; a ValueError is raised if the method lacks one of them, or its shapes differ.
    """
    initial: Params = jax.tree.map(
        jnp.copy, problem.init(key)
    )  # some methods start from frozen weights
    params = initial if params is None else initial | _like(params, initial)
    unpruned = jax.tree.map(lambda m: jnp.ones(m.shape, bool), params.get("magnitudes"))
    return TrainState(
        params=params,
        adam=_ADAM.init(params),
        step=jnp.int32(0),
        kept=unpruned,
        best=jax.tree.map(jnp.copy, params),
        best_loss=jnp.float32(jnp.inf),
        waited=jnp.int32(0),
        stopped=jnp.bool_(False),
    )


def fusion_step(
    state: TrainState,
    batch: Batch,
    problem: Problem,
    rates: Rates,
    steps: Float[Array, ""] | None = None,
    *,
    optimisation: Optimisation,
) -> tuple[TrainState, Metrics]:
    """Take one step of one seed, with the weights that its problem has for this step.

    Non-finite gradients are set to zero and counted, then clipped; Adam; pruned magnitudes stay zero; a stopped seed
    does not change, and neither does one whose batch has no rows.

    `optimisation` is structure: `jax.jit(fusion_step, static_argnames="optimisation")`. `steps` is the length of its
    schedule as an array, so that trainings of other lengths share a program.

    Returns:
      The new state, and metrics: loss, cross_entropy (nats per token), penalty, gradient_norm,
      nonfinite_gradients, and the method's own.

    Raises:
      ValueError: a group of parameters has no learning rate.
    """
    if missing := state.params.keys() - rates.keys():
        raise ValueError(
            f"no learning rate for {', '.join(sorted(missing))}: add it to the rates"
        )
    problem = problem.replace(frozen=problem.frozen.of_step(state.step, problem.graph))
    (_, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(
        state.params, batch, problem
    )
    broken = sum(
        jnp.sum(~jnp.isfinite(g), dtype=jnp.int32) for g in jax.tree.leaves(gradients)
    )
    gradients = jax.tree.map(
        lambda g: jnp.where(jnp.isfinite(g), g, jnp.zeros_like(g)), gradients
    )
    metrics |= {
        "nonfinite_gradients": broken,
        "gradient_norm": optax.tree.norm(gradients),
    }
    updates, adam = _adam(gradients, state, optimisation.clip)
    with standard_promotion():
        length = jnp.asarray(
            optimisation.steps if steps is None else steps, jnp.float32
        )
        schedule = _schedule(state.step, length, optimisation)
    params = {
        group: jax.tree.map(
            lambda p, u, rate=rates[group] * schedule: p - rate * u,
            values,
            updates[group],
        )
        for group, values in state.params.items()
    }
    if optimisation.prune:
        params["magnitudes"] = jax.tree.map(
            _zero_unless, state.kept, params["magnitudes"]
        )
        adam = _prune_moments(adam, state.kept)
    new = state._replace(params=params, adam=adam, step=state.step + 1)
    return _select(state.stopped | ~jnp.any(batch.row_mask), state, new), metrics


def prune(state: TrainState, share: float) -> TrainState:
    """Return the state with the smallest `share` of all magnitudes at zero, ranked over all entries.

    They and their Adam moments stay zero. The best parameters so far, which are not pruned, are forgotten.
    """
    magnitudes = state.params["magnitudes"]
    flat, unflatten = ravel_pytree(jax.tree.map(jnp.abs, magnitudes))
    smallest = jnp.argsort(flat)[: int(share * flat.size)]
    unpruned = jax.tree.map(
        lambda k: k > 0, unflatten(jnp.ones_like(flat).at[smallest].set(0))
    )
    params = state.params | {
        "magnitudes": jax.tree.map(_zero_unless, unpruned, magnitudes)
    }
    new = state._replace(
        params=params,
        adam=_prune_moments(state.adam, unpruned),
        kept=unpruned,
        best=params,
        best_loss=jnp.full_like(state.best_loss, jnp.inf),
    )
    return _select(state.stopped, state, new)


def end_epoch(
    state: TrainState,
    validation_loss: Float[Array, ""],
    epoch: Int[Array, ""],
    optimisation: Optimisation,
) -> TrainState:
    """Remember the best parameters, and stop after `patience` counted epochs without better ones."""
    better = validation_loss < state.best_loss
    counted = (epoch >= optimisation.patience_from).astype(jnp.int32)
    waited = jnp.where(better, 0, state.waited + counted)
    stopped = jnp.bool_(False)
    if optimisation.patience is not None:
        stopped = waited >= optimisation.patience
    new = state._replace(
        best=_select(better, state.params, state.best),
        best_loss=jnp.where(better, validation_loss, state.best_loss),
        waited=waited,
        stopped=stopped,
    )
    return _select(state.stopped, state, new)


_ADAM = (
    optax.scale_by_adam()
)  # beta 0.9 / 0.999, eps 1e-8: torch's defaults, and the paper's


def _adam(gradients: Any, state: TrainState, clip: float | None) -> tuple[Params, Any]:
    """Clip, and return Adam's updates (before the learning rates) and its state."""
    updates: Any = gradients
    with standard_promotion():
        if clip is not None:
            updates, _ = optax.clip_by_global_norm(clip).update(
                updates, optax.EmptyState()
            )
        updates, adam = _ADAM.update(updates, state.adam, state.params)
    return updates, adam


def _schedule(
    step: Int[Array, ""], steps: Float[Array, ""], optimisation: Optimisation
) -> Float[Array, ""]:
    """Return the factor of the learning rates, as optax's linear warm-up and cosine decay."""
    warmup = optimisation.warmup
    factor = jnp.float32(1)
    if optimisation.schedule == "cosine":
        decay_steps = jnp.maximum(steps - warmup, 1)
        count = jnp.clip(step - warmup, 0, decay_steps)
        factor = 0.5 * (1 + jnp.cos(jnp.pi * count / decay_steps))
    return jnp.where(step < warmup, (step + 1) / max(warmup, 1), factor)


def _prune_moments(adam: Any, unpruned: Any) -> Any:
    def pruned(moment: Params) -> Params:
        return moment | {
            "magnitudes": jax.tree.map(_zero_unless, unpruned, moment["magnitudes"])
        }

    return adam._replace(mu=pruned(adam.mu), nu=pruned(adam.nu))


def _like(params: Params, initial: Params) -> Params:
    """Return copies of given parameters in the types of a method's own."""
    for group, values in params.items():
        if group not in initial:
            raise ValueError(
                f"no group {group!r} to start from: expected some of {', '.join(initial) or 'none'}"
            )
        start_shapes = jax.tree.map(jnp.shape, values)
        shapes = jax.tree.map(jnp.shape, initial[group])
        if start_shapes != shapes:
            raise ValueError(
                f"parameters to start from: expected {group} of the shapes {shapes}, got {start_shapes}"
            )
    return jax.tree.map(
        lambda new, old: jnp.array(new, old.dtype),
        params,
        {group: initial[group] for group in params},
    )


def _zero_unless(mask: Array, value: Array) -> Array:
    return jnp.where(mask, value, jnp.zeros_like(value))


def _select(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
