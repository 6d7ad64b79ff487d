"""Restoring a model on a chip: digital corrections from unlabelled inputs, without writing a cell.

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
from ..crossbar.calibration.restore import closed_forms, output_moments
from ..support.checks import at_least, one_of
from ..support.progress import progress
from ..training.mesh import on_mesh
from ..training.seeds import over_seeds
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
      ridge: ridge of the closed forms (see `crossbar.fit_corrections`).
      epochs: passes of distillation over the inputs; 0 for the closed form alone.
      rate: Adam's learning rate of factors and offsets.
      rate_low_rank: that of the matrices; by default 0.001, and 0.003 for `lora`.
      seed: seed of the order of the inputs, and of the start of `lora`.
    """

    method: Method = "scales"
    numbers: int = 0
    ridge: float = 1e-2
    epochs: int = 5
    rate: float = 1e-2
    rate_low_rank: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(get_args(Method), method=self.method)
        at_least(0, epochs=self.epochs)
        for name in ("ridge", "rate", "rate_low_rank"):
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
    corrections = restore_each(
        run,
        _stacked([weights]),
        matrices,
        batches,
        targets,
        how,
        left_out=left_out,
        counted=counted,
    )
    return corrections[0]


def restore_each(
    run: Run,
    models: Any,
    matrices: Sequence[Float[Array, "*N d_in d_out"]],
    batches: Sequence[Any],
    targets: Sequence[Float[Array, "*B V"]],
    how: Restoring,
    *,
    left_out: LeftOut | None,
    counted: Callable[[Any, str], Bool[Array, "*B"]] | None,
) -> list[dict[str, crossbar.Correction]]:
    """Return what `restore` does for each of several models on chips.

    `models` are their weights: every leaf has a leading axis of models, which a mesh splits over its axis `seed`.
    """
    names = [chip.name for chip in crossbar.chips_in(models)]
    count = len(jax.tree.leaves(models)[0])
    key = jax.random.fold_in(jax.random.key(how.seed), 1)
    if how.method == "lora":
        corrections = [_zeros(names, matrices, how.numbers, key)] * count
    else:
        offsets = how.method == "offsets"
        total = output_moments(
            of_each(run),
            models,
            [_stacked([m] * count) for m in matrices],
            batches,
            counted,
            offsets=offsets,
            numbers=how.numbers,
            ridge=how.ridge,
        )
        total = jax.device_get(total)
        moments_of_models = (
            jax.tree.map(lambda leaf, place=place: leaf[place], total)
            for place in range(count)
        )
        corrections = [
            closed_forms(
                names,
                matrices,
                moments,
                offsets=offsets,
                numbers=how.numbers,
                ridge=how.ridge,
            )
            for moments in moments_of_models
        ]
        if how.epochs and left_out is not None:
            starts = (
                corrections,
                [_neutral(correction, key) for correction in corrections],
            )
            off = [
                _diverged(run, models, stacked_corrections(start), left_out)
                for start in starts
            ]
            corrections = [
                correction if a <= b else neutral
                for correction, neutral, a, b in zip(*starts, *off, strict=True)
            ]
    if how.epochs:
        return _distil_each(run, models, corrections, batches, targets, how, left_out)
    return corrections


@lru_cache  # the same function again: it is compiled once for each
def of_each(run: Run) -> Run:
    """Return a function from the weights of several models (see `restore_each`) and a batch to the logits of each."""
    return lambda models, batch: over_seeds(run, "sequential")(models, batch)


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
    return _distil_each(
        run, _stacked([weights]), [corrections], batches, targets, how, left_out
    )[0]


def _distil_each(
    run: Run,
    models: Any,
    corrections: Sequence[crossbar.Corrections],
    batches: Sequence[Any],
    targets: Sequence[Float[Array, "*B V"]],
    how: Restoring,
    left_out: LeftOut | None,
) -> list[dict[str, crossbar.Correction]]:
    if len(batches) != len(targets) or not batches:
        raise ValueError(
            f"{len(batches)} batches and {len(targets)} targets: expected as many, and at least 1"
        )
    steps = how.epochs * len(batches)
    best = _stacked_parts(corrections)
    params = jax.tree.map(jnp.copy, best)
    optimiser = _optimiser(how.rate, how.rate_of_matrices, steps)
    key = jax.random.fold_in(jax.random.key(how.seed), 0)
    state = jax.vmap(optimiser.init)(params)
    orders = [
        jax.random.permutation(jax.random.fold_in(key, epoch), len(batches))
        for epoch in range(how.epochs)
    ]
    if left_out is None:
        least = np.array(math.inf)
    else:
        least = _diverged(run, models, _corrections(best), left_out)
    with progress("steps", steps) as bar:
        for step, number in enumerate(np.concatenate(orders), start=1):
            read_models = crossbar.reads(models, step - 1)
            target = targets[number]
            _check_target(target, int(number))
            params, state = _step(
                params,
                state,
                read_models,
                batches[number],
                target,
                run,
                optimiser.update,
            )
            bar.update()
            if step % len(batches) == 0:
                current = jax.tree.map(
                    jnp.copy, params
                )  # the step reuses the memory of params
                better = np.ones(len(corrections), bool)
                if left_out is not None:
                    better = (
                        diverged := _diverged(
                            run, models, _corrections(current), left_out
                        )
                    ) < least
                    least = np.where(better, diverged, least)
                best = jax.tree.map(partial(_where, better), current, best)
    best = jax.device_get(best)
    return [
        {site: _cut(best[site], place, like) for site, like in correction.items()}
        for place, correction in enumerate(corrections)
    ]


@lru_cache  # the same function again: a step is compiled once for all chips
def _optimiser(
    rate: float, rate_low_rank: float, steps: int
) -> optax.GradientTransformation:
    def kinds(params: Any) -> Any:
        return {
            s: {name: "low rank" if name in ("U", "V") else "columns" for name in parts}
            for s, parts in params.items()
        }

    rates = {"columns": rate, "low rank": rate_low_rank}
    return optax.multi_transform(
        {
            kind: optax.adam(optax.cosine_decay_schedule(kind_rate, steps))
            for kind, kind_rate in rates.items()
        },
        kinds,
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
    def of_model(model: Any, shared: Any) -> tuple[Any, Any]:
        params, state, weights = model
        batch, target = shared

        def loss(params: Any) -> Array:
            return divergence(
                run(crossbar.with_corrections(weights, _corrections(params)), batch),
                target,
            )

        gradient = jax.grad(loss)(params)
        with standard_promotion():
            updates, state = update(gradient, state)
        return optax.apply_updates(params, updates), state

    return over_seeds(of_model, "sequential")((params, state, weights), (batch, target))


def _diverged(
    run: Run, models: Any, corrections: crossbar.Corrections, left_out: LeftOut
) -> Float[np.ndarray, " C"]:
    """Return the mean divergence of each model with corrections from the targets."""
    corrected = crossbar.with_corrections(models, corrections)
    diverged = []
    for number, (batch, target) in enumerate(zip(*left_out, strict=True)):
        _check_target(target, number)
        read_models = crossbar.reads(corrected, number)
        diverged.append(divergences(read_models, batch, target, run))
    return np.mean(diverged, axis=0, dtype=float)


def _check_target(target: Array, number: int) -> None:
    """Raise a ValueError for logits that are not finite."""
    if not bool(jnp.all(jnp.isfinite(target))):
        raise ValueError(
            f"the targets of batch {number} are NaN or infinite: give the digital model's finite logits"
        )


@partial(jax.jit, static_argnums=3)
def divergences(models: Any, batch: Any, target: Array, run: Run) -> Float[Array, " C"]:
    """Return the divergence of each of several models from the targets of a batch."""
    off = over_seeds(
        lambda weights, shared: divergence(run(weights, shared[0]), shared[1]),
        "sequential",
    )
    return off(models, (batch, target))


def stacked_corrections(
    corrections: Sequence[crossbar.Corrections],
) -> dict[str, crossbar.Correction]:
    """Return the corrections of several models with a leading axis, filled up to the highest rank with zeros."""
    return _corrections(_stacked_parts(corrections))


def _stacked_parts(
    corrections: Sequence[crossbar.Corrections],
) -> dict[str, dict[str, Array]]:
    parts = [
        {site: _parts(correction) for site, correction in model_corrections.items()}
        for model_corrections in corrections
    ]
    of_one_rank(parts)
    return _stacked(parts)


def _parts(correction: crossbar.Correction) -> dict[str, Array]:
    return {
        name: values for name, values in vars(correction).items() if values is not None
    }


def of_one_rank(chip_parts: Sequence[dict[str, dict[str, Any]]]) -> None:
    """Fill up matrices of low rank with zeros, so that those of all chips have one shape."""
    for site in chip_parts[0]:
        parts = [sites[site] for sites in chip_parts if "U" in sites[site]]
        widest = max((part["V"].shape[-2] for part in parts), default=0)
        for part in parts:
            padding = (0, widest - part["V"].shape[-2])
            lead = [(0, 0)] * (part["V"].ndim - 2)
            part["U"], part["V"] = (
                np.pad(part["U"], [*lead, (0, 0), padding]),
                np.pad(part["V"], [*lead, padding, (0, 0)]),
            )


def _cut(
    parts: dict[str, np.ndarray], place: int, like: crossbar.Correction
) -> crossbar.Correction:
    """Return one of stacked corrections in the shapes of another one."""
    shapes = {
        name: tuple(map(slice, values.shape)) for name, values in _parts(like).items()
    }
    return crossbar.Correction(
        **{
            name: jnp.asarray(parts[name][place][shape])
            for name, shape in shapes.items()
        }
    )


def _stacked(trees: Sequence[Any]) -> Any:
    return on_mesh(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees), of_seeds=True
    )


def _where(better: np.ndarray, new: Array, old: Array) -> Array:
    return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _neutral(
    corrections: crossbar.Corrections, key: Array
) -> dict[str, crossbar.Correction]:
    """Return corrections of the same kind and shapes that change nothing yet: U is random, and V is zero."""

    def of_part(name: str, values: Array, key: Array) -> Array:
        if name == "U":
            return jax.random.normal(key, values.shape) * values.shape[-2] ** -0.5
        return jnp.ones_like(values) if name == "scale" else jnp.zeros_like(values)

    neutral = {}
    for number, (site, correction) in enumerate(corrections.items()):
        key_here = jax.random.fold_in(key, number)
        neutral[site] = crossbar.Correction(
            **{
                name: of_part(name, v, key_here)
                for name, v in _parts(correction).items()
            }
        )
    return neutral


def _corrections(params: dict[str, dict[str, Array]]) -> dict[str, crossbar.Correction]:
    return {site: crossbar.Correction(**parts) for site, parts in params.items()}


def divergence(
    logits: Float[Array, "*B V"], target: Float[Array, "*B V"]
) -> Float[Array, ""]:
    """Return the mean of KL(softmax(target) || softmax(logits)), in nats."""
    target_log_probs = jax.nn.log_softmax(target.astype(jnp.float32))
    got = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.mean(
        jnp.sum(jnp.exp(target_log_probs) * (target_log_probs - got), axis=-1)
    )


def _zeros(
    names: Sequence[str], matrices: Sequence[Array], numbers: int, key: Array
) -> dict[str, crossbar.Correction]:
    """Return corrections of low rank that change nothing yet: U is random and V is zero, as in LoRA."""
    per_rank = crossbar.numbers_per_rank(matrices)
    if not (rank := numbers // per_rank):
        raise ValueError(
            f"{numbers:,} numbers are less than one rank for each matrix: give at least {per_rank:,}"
        )
    empty = {}
    for name, matrix in zip(names, matrices, strict=True):
        *lead, d_in, d_out = matrix.shape
        empty[name] = crossbar.Correction(
            U=jnp.zeros((*lead, d_in, rank)), V=jnp.zeros((*lead, rank, d_out))
        )
    return _neutral(empty, key)
