"""Digital corrections of a model on a chip, from unlabelled inputs, without writing a cell.

Closed forms fit them matrix by matrix (`crossbar.fit_corrections`). Distillation then trains them to give the digital
model's outputs on the chip, with gradients through the chip's reads.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from .. import crossbar
from ..support.checks import at_least, one_of
from ..support.progress import progress
from ..training.step import standard_promotion

# (weights, batch) -> logits. Use one function for all calls, because each function is compiled once.
Run = Callable[[Any, Any], Float[Array, "*B V"]]
Method = Literal["scales", "offsets", "low-rank", "lora"]
# Inputs without labels, and the digital model's logits of each.
LeftOut = tuple[Sequence[Any], Sequence[Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restoring:
    """Kind of the corrections, and their training.

    Attributes:
      method: a factor of each column (`scales`); an offset too (`offsets`); factors and matrices of low rank
        (`low-rank`); or these matrices alone, which start as zeros (`lora`).
      numbers: digital parameters that matrices of low rank may have in all.
      epochs: passes of distillation over the inputs; 0 for the closed form alone.
      rate: Adam's learning rate of factors and offsets.
      rate_low_rank: that of the matrices; by default 0.001, and 0.003 for `lora`.
      seed: seed of the order of the inputs, and of the start of `lora`.
    """

    method: Method = "scales"
    numbers: int = 0
    epochs: int = 5
    rate: float = 1e-2
    rate_low_rank: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(get_args(Method), method=self.method)
        at_least(0, epochs=self.epochs)
        for name in ("rate", "rate_low_rank"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(
                    f"{name} is {value}: expected a finite number of at least 0"
                )
        if (self.method in ("low-rank", "lora")) != (self.numbers > 0):
            raise ValueError(
                f"the method {self.method} with {self.numbers} numbers of low rank: expected more than 0 for low-rank "
                "and lora, and 0 for scales and offsets"
            )
        if self.method == "lora" and not self.epochs:
            raise ValueError(
                "lora starts as zeros and has no closed form: give 1 epoch or more, or choose low-rank"
            )

    @property
    def rate_of_matrices(self) -> float:
        """Adam's learning rate of the matrices, with its default."""
        if self.rate_low_rank is not None:
            return self.rate_low_rank
        return 3e-3 if self.method == "lora" else 1e-3


def restore(
    run: Run,
    weights: Any,
    matrices: Sequence[Float[Array, "*N d_in d_out"]],
    batches: Sequence[Any],
    targets: Sequence[Float[Array, "*B V"]],
    how: Restoring = Restoring(),
    *,
    left_out: LeftOut | None = None,
    counted: Callable[[Any, str], Bool[Array, "*B"]] | None = None,
) -> dict[str, crossbar.Correction]:
    """Return corrections that bring a model on chips back to its digital outputs, by the names of the chips.

    Put them on the chips by `crossbar.with_corrections(weights, corrections)`.

    Args:
      run: function from weights and a batch to logits.
      weights: tree with calibrated chips, of any model.
      matrices: digital matrices of the chips, in the order of `crossbar.chips_in`.
      batches: inputs without labels, all of one shape.
      targets: the digital model's logits of every batch; a sequence may compute them where they are read.
      how: kind of the corrections, and their training.
      left_out: inputs and targets that are not trained on. On these, training starts from factors of 1 if they are
        better than the closed form, and the best epoch is kept.
      counted: inputs that are no padding, as for `crossbar.moments`.

    Raises:
      ValueError: there are no batches, targets are not finite, or what `crossbar.fit_corrections` refuses.
    """
    key = jax.random.fold_in(jax.random.key(how.seed), 1)
    if how.method == "lora":
        per_rank = crossbar.numbers_per_rank(matrices)
        if not (rank := how.numbers // per_rank):
            raise ValueError(
                f"{how.numbers:,} numbers are less than one rank for each matrix: give at least {per_rank:,}"
            )
        zeros = {}
        for chip in crossbar.chips_in(weights):
            *lead, d_in, d_out = chip.shape
            zeros[chip.name] = crossbar.Correction(
                U=jnp.zeros((*lead, d_in, rank)), V=jnp.zeros((*lead, rank, d_out))
            )
        corrections = _neutral(zeros, key)
    else:
        corrections = crossbar.fit_corrections(
            run,
            weights,
            matrices,
            batches,
            offsets=how.method == "offsets",
            numbers=how.numbers,
            counted=counted,
        )
        if how.epochs and left_out is not None:
            neutral = _neutral(corrections, key)
            closed_form_loss = _mean_divergence(run, weights, corrections, left_out)
            if not closed_form_loss <= _mean_divergence(
                run, weights, neutral, left_out
            ):
                corrections = neutral
    if how.epochs:
        return distil(
            run, weights, corrections, batches, targets, how, left_out=left_out
        )
    return corrections


def distil(
    run: Run,
    weights: Any,
    corrections: crossbar.Corrections,
    batches: Sequence[Any],
    targets: Sequence[Float[Array, "*B V"]],
    how: Restoring,
    *,
    left_out: LeftOut | None = None,
) -> dict[str, crossbar.Correction]:
    """Return corrections trained for the digital model's distribution of the next token; arguments as for `restore`.

    Each step minimises KL(digital || chip) on one batch with Adam, whose rates fall to zero in a cosine. Every epoch
    has a separate random order.
    """
    if len(batches) != len(targets) or not batches:
        raise ValueError(
            f"{len(batches)} batches and {len(targets)} targets: expected as many, and at least 1"
        )
    steps = how.epochs * len(batches)
    best = {site: _parts(correction) for site, correction in corrections.items()}
    params = jax.tree.map(jnp.copy, best)
    optimiser = _optimiser(how.rate, how.rate_of_matrices, steps)
    state = optimiser.init(params)
    key = jax.random.fold_in(jax.random.key(how.seed), 0)
    orders = [
        jax.random.permutation(jax.random.fold_in(key, epoch), len(batches))
        for epoch in range(how.epochs)
    ]
    best_loss = math.inf
    if left_out is not None:
        best_loss = _mean_divergence(run, weights, corrections, left_out)
    with progress("steps", steps) as bar:
        for step, number in enumerate(np.concatenate(orders), start=1):
            target = targets[number]
            _check_target(target, int(number))
            params, state = _step(
                params,
                state,
                crossbar.reads(weights, step - 1),
                batches[number],
                target,
                run,
                optimiser.update,
            )
            bar.update()
            if left_out is not None and step % len(batches) == 0:
                loss = _mean_divergence(run, weights, _corrections(params), left_out)
                if loss < best_loss:
                    best_loss = loss
                    best = jax.tree.map(jnp.copy, params)  # a step reuses their memory
    if left_out is None:
        best = params
    return _corrections(best)


@lru_cache  # the same function again: a step is compiled once for all chips
def _optimiser(
    rate: float, rate_low_rank: float, steps: int
) -> optax.GradientTransformation:
    rates = {"scale": rate, "offset": rate, "U": rate_low_rank, "V": rate_low_rank}
    return optax.multi_transform(
        {
            part: optax.adam(optax.cosine_decay_schedule(part_rate, steps))
            for part, part_rate in rates.items()
        },
        lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key, params),
    )


@partial(jax.jit, static_argnums=(5, 6), donate_argnums=(0, 1))
def _step(
    params: Any,
    state: Any,
    weights: Any,
    batch: Any,
    target: Array,
    run: Run,
    update: Any,
) -> tuple[Any, Any]:
    def loss(params: Any) -> Array:
        corrected = crossbar.with_corrections(weights, _corrections(params))
        return divergence(run(corrected, batch), target)

    gradient = jax.grad(loss)(params)
    with standard_promotion():
        updates, state = update(gradient, state)
    return optax.apply_updates(params, updates), state


def _mean_divergence(
    run: Run, weights: Any, corrections: crossbar.Corrections, left_out: LeftOut
) -> float:
    """Return the mean divergence of a model with corrections from the targets."""
    corrected = crossbar.with_corrections(weights, corrections)
    divergences = []
    for number, (batch, target) in enumerate(zip(*left_out, strict=True)):
        _check_target(target, number)
        read_weights = crossbar.reads(corrected, number)
        divergences.append(divergence_on(read_weights, batch, target, run))
    return float(np.mean(divergences, dtype=float))


def _check_target(target: Array, number: int) -> None:
    """Raise a ValueError for logits that are not finite."""
    if not bool(jnp.all(jnp.isfinite(target))):
        raise ValueError(
            f"the targets of batch {number} are NaN or infinite: give the digital model's finite logits"
        )


@partial(jax.jit, static_argnums=3)
def divergence_on(
    weights: Any, batch: Any, target: Array, run: Run
) -> Float[Array, ""]:
    """Return the divergence of a model from the targets of a batch."""
    return divergence(run(weights, batch), target)


def divergence(
    logits: Float[Array, "*B V"], target: Float[Array, "*B V"]
) -> Float[Array, ""]:
    """Return the mean of KL(softmax(target) || softmax(logits)), in nats."""
    target_log_probs = jax.nn.log_softmax(target.astype(jnp.float32))
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.mean(
        jnp.sum(jnp.exp(target_log_probs) * (target_log_probs - log_probs), axis=-1)
    )


def _parts(correction: crossbar.Correction) -> dict[str, Array]:
    return {
        name: values for name, values in vars(correction).items() if values is not None
    }


def _corrections(params: dict[str, dict[str, Array]]) -> dict[str, crossbar.Correction]:
    return {site: crossbar.Correction(**parts) for site, parts in params.items()}


def _neutral(
    corrections: crossbar.Corrections, key: Array
) -> dict[str, crossbar.Correction]:
    """Return corrections of the same kind and shapes that change nothing yet: U is random, and V is zero."""
    neutral = {}
    for number, (site, correction) in enumerate(corrections.items()):
        parts = jax.tree.map(jnp.zeros_like, _parts(correction))
        if correction.scale is not None:
            parts["scale"] = jnp.ones_like(correction.scale)
        if correction.U is not None:
            shape = correction.U.shape
            normal = jax.random.normal(jax.random.fold_in(key, number), shape)
            parts["U"] = normal * shape[-2] ** -0.5
        neutral[site] = crossbar.Correction(**parts)
    return neutral
