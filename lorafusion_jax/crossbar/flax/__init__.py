"""Any NNX model on arrays: its products become reads of programmed chips.

    model = crossbar.flax.convert(model, {"head": None, "*": config}, key)
    model = crossbar.flax.calibrate(model, batches)  # ranges of the converters, from data
    y = crossbar.flax.with_read_key(model, key)(x)  # with read noise: another key for every step

A layer's code still runs digitally; only its kernel and the product with it are replaced. This folder alone imports
Flax.
"""

import dataclasses
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ..calibration import whole_model
from ..chip import chip as chips
from ..chip.tree import Preparations, Rules, check_rules, first_match, one_key
from ..config.presets import PRESETS
from ..config.schema import CrossbarConfig
from ..exploration import Exploration, Subject
from ..preparation import prepare as preparing
from ..preparation.moments import moments
from ..preparation.preparation import Preparation, needs_preparation
from .layers import InArrays, Kernel, Model, converted, on_arrays

__all__ = [
    "InArrays",
    "Kernel",
    "calibrate",
    "convert",
    "count_reads",
    "evaluate",
    "explore",
    "prepare",
    "site_errors",
    "with_read_key",
]


def prepare(
    model: nnx.Module,
    rules: Rules,
    batches: Sequence[Any] | None = None,
    *,
    together: Sequence[Sequence[str]] = (),
    seed: int = 0,
    **options: Any,
) -> dict[str, Preparation]:
    """Return the preparations that rules need (see `crossbar.prepare`), by path: one for each layer.

    Args:
      model: the digital model.
      rules: as for `convert`.
      batches: inputs of the model, as for `calibrate`, which show how strong those of each layer are; None for equal
        ones.
      together: paths of layers with the same input, such as queries, keys and values, which share a transform.
      seed: seed of the transforms' signs.

    Raises:
      ValueError: layers of `together` are not on arrays, have other inputs or other configurations, or what
        `crossbar.prepare` and `convert` refuse.
    """
    _check(model, rules)
    weights = on_arrays(model, rules)
    groups = _groups(weights, together)
    if not any(config and needs_preparation(config) for config in rules.values()):
        return {}
    squares = {}
    preparations = {}
    if batches is not None:
        _check_batches(batches)
        perfect = {
            pattern: config and PRESETS["ideal"] for pattern, config in rules.items()
        }
        digital = converted(model, perfect, jax.random.key(0), {})
        squares = moments(_run(digital, options), nnx.state(digital), batches)
    for group in groups:
        config = first_match(group[0], rules)
        first = squares.get(group[0])
        assert config is not None
        for path in group:
            if first_match(path, rules) is not config:
                raise ValueError(
                    f"{path} and {group[0]} in `together` have two configurations: give both one"
                )
            if first is not None and (
                first.shape != squares[path].shape
                or not np.allclose(first, squares[path])
            ):
                raise ValueError(
                    f"{path} and {group[0]} in `together` meet different inputs: leave one of them out"
                )
        if needs_preparation(config):
            preparations |= preparing.prepare(
                {path: weights[path] for path in group}, first, config, seed=seed
            )
    return preparations


def _groups(
    weights: Mapping[str, Array], together: Sequence[Sequence[str]]
) -> list[Sequence[str]]:
    """Return the paths of layers, in groups with the same input; ValueError for one that is not on arrays."""
    grouped = {path for group in together for path in group}
    if unknown := sorted(grouped - weights.keys()):
        raise ValueError(
            f"{', '.join(unknown)} in `together`: expected layers on arrays: {', '.join(weights)}"
        )
    return [*together, *([path] for path in weights if path not in grouped)]


def convert(
    model: Model, rules: Rules, key: Array, preparations: Preparations | None = None
) -> Model:
    """Return a copy of an NNX model that multiplies on arrays.

    These layers can be put there: `Linear`, `LinearGeneral`, `Einsum`, and `Conv` (as a matrix that reads patches). So
    can what is made of them, such as attention. Everything else stays digital: also an `Embed`, and a head that is tied
    to it.

    A kernel on arrays is not trained; biases and all other parameters are. It is a variable of the type `InArrays`,
    which needs an axis wherever `nnx.StateAxes` gives one to `nnx.Param`.

    Args:
      rules: as for `program_tree`. The paths are those of layers: `blocks.layers.0.query`. Layers that are stacked by
        `nnx.vmap` are one path and have one rule; their axis is the first of their parameters.
      key: key [] of the chip. The arrays of a layer depend on it and on the layer's path.
      preparations: those of `prepare`; None for inputs of equal power, where a configuration needs some.

    Raises:
      ValueError: a rule matches nothing, or something that cannot be put on arrays, or never decides; qwix made the
        model, or it is no NNX module.
    """
    _check(model, rules)
    for pattern, config in rules.items():
        if (
            config is not None
            and config.device.drift is not None
            and config.device.time is None
        ):
            warnings.warn(
                f"the rule {pattern!r} has a device.drift, but its device.time is None: nothing drifts. Give the "
                "seconds since programming",
                stacklevel=2,
            )
    if preparations is None:
        preparations = prepare(model, rules)
    return converted(model, rules, one_key(key), preparations)


def _check(model: Any, rules: Any) -> None:
    check_rules(rules)
    if hasattr(type(model), "_unquantized_type"):
        raise ValueError(
            "the model comes from qwix.quantize_model or apply_lora_to_model, which would quantise the reads of arrays "
            "as well, or lose its LoRA: give the model without qwix; a LoRA next to arrays is nnx.LoRA or LoRALinear"
        )
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"a model of type {type(model).__name__}: give an NNX module, or put the matrices of another model on "
            "arrays by crossbar.program_tree"
        )


def calibrate(
    model: Model,
    batches: Sequence[Any],
    *,
    tradeoff: float | None = None,
    sensitivities: Mapping[str, float] | None = None,
    **options: Any,
) -> Model:
    """Return a model from `convert` with the ranges of its converters set from data.

    Args:
      batches: inputs of the model, one call each: an array, or a tuple of arguments.
      tradeoff: choose tables of ADC bits, as `calibrate_tree` does with `sensitivities` of layers.

    Raises:
      ValueError: there are no batches, none of them reads some of the arrays, or `jax.jit` or `jax.vmap` hides values.
    """
    _check_batches(batches)
    graph, tree = nnx.split(model)
    done = whole_model.calibrate_tree(
        _run(model, options),
        _keyed(tree, jax.random.key(0)),
        batches,
        tradeoff=tradeoff,
        sensitivities=sensitivities,
    )
    both = zip(chips.chips_in(done), chips.chips_in(tree), strict=True)
    keyed = [dataclasses.replace(new, key=old.key) for new, old in both]
    return nnx.merge(graph, chips.with_chips(done, keyed))


def evaluate(
    model: nnx.Module,
    rules: Rules,
    keys: Iterable[Array],
    metric: Callable[[Any], Any],
    *,
    batches: Sequence[Any] | None = None,
    preparations: Preparations | None = None,
) -> np.ndarray:
    """Return a metric of a model on several chips, [chips, ...].

    Args:
      rules: as for `convert`.
      keys: a key [] for each chip, such as jax.random.split(jax.random.key(0), 10); noise of reads follows from it.
      metric: function from the model on one chip to a number or an array, such as the accuracy on test data.
      batches: inputs of the model, from which converters get their ranges and weights their preparations.
      preparations: those of `prepare`; None to make them where a configuration needs some.
    """
    if preparations is None:
        preparations = prepare(model, rules, batches)
    values = []
    for key in keys:
        chip = convert(model, rules, key, preparations)
        if batches is not None:
            chip = calibrate(chip, batches)
        values.append(
            np.asarray(metric(with_read_key(chip, jax.random.fold_in(key, 1))))
        )
    return np.stack(values)


def explore(
    model: nnx.Module,
    batches: Sequence[Any],
    metric: Callable[[Any, Any], Array],
    grid: Mapping[str, CrossbarConfig],
    *,
    digital: Sequence[str] = (),
    together: Sequence[Sequence[str]] = (),
    file: Path | None = None,
    minutes: float | None = None,
) -> Exploration:
    """Return a comparison of configurations for a model: `choose(bound)` simulates and names the cheapest.

    Args:
      model: the digital model.
      batches: at least six; a third of them to measure, one to choose on, and one to confirm on.
      metric: differentiable function from a model and a batch to its losses, such as those of a batch's images. Costs
        are those of one of them.
      grid: configurations by label, such as those of `crossbar.grid`.
      digital: patterns of layers that stay digital.
      together: as for `prepare`.
      file: JSON lines of results, which the same call continues; None to keep them in memory.
      minutes: time after which nothing more is measured, a ValueError; None for no limit.

    Raises:
      ValueError: there are too few batches, the file holds results of another model or other batches, a converter has
        no energy, or what `convert` refuses.
    """
    ideal = dict.fromkeys(digital) | {"*": PRESETS["ideal"]}
    _check(model, ideal)
    _check_batches(batches)
    weights = on_arrays(model, ideal)

    def place(rules: Rules, key: Array, preparations: Preparations) -> tuple[Any, Any]:
        graph, tree = nnx.split(converted(model, rules, key, preparations))
        return _Run(graph, metric), _keyed(tree, key)

    run, tree = place(ideal, jax.random.key(0), {})
    losses = jax.eval_shape(run, tree, batches[0]).size
    subject = Subject(
        weights=weights,
        together=_groups(weights, together),
        products={
            path: round(number / losses)
            for path, number in _vectors(run, tree, batches[0]).items()
        },
        place=place,
    )
    return Exploration(subject, batches, grid, file=file, minutes=minutes)


def site_errors(
    model: Any, batches: Iterable[Any], **options: Any
) -> list[dict[str, Any]]:
    """Return a row for every layer on arrays, or for every one of a stack: how well it is read, what is clipped.

    Rows have {site, layer, sqnr, clipped, clipped_inputs}. Rows and warnings are those of `crossbar.site_errors`, and
    the arguments those of `calibrate`.
    """
    _check_batches(batches)
    tree = _keyed(nnx.state(model), jax.random.key(0))
    return whole_model.site_errors(
        tree, whole_model.observe(_run(model, options), tree, batches)
    )


def count_reads(model: Any, *inputs: Any, **options: Any) -> dict[str, int]:
    """Return the number of vectors that the arrays of each layer read in one call of a model from `convert`, by path.

    A convolution reads one vector for each position of each image, and a grouped one, one in each group; numbers are
    summed over stacked layers and groups. Multiply `crossbar.counts` of one matrix by them for the energy of a layer.

    Raises:
      ValueError: the outputs have no gradient with respect to a layer, because they are classes or do not use it.
    """
    counted = _vectors(_run(model, options), nnx.state(model), inputs)
    if missing := [name for name, number in counted.items() if number == 0]:
        raise ValueError(
            f"the outputs have no gradient with respect to {', '.join(missing)}: let the model return logits instead "
            "of classes, and leave layers that it does not use digital"
        )
    return counted


def _vectors(run: Callable[[Any, Any], Array], tree: Any, batch: Any) -> dict[str, int]:
    """Return the number of vectors that the arrays of each layer read in one call, by path."""
    leaves = chips.chips_in(tree)
    zeros = [jnp.zeros(leaf.shape[:-2], jnp.float32) for leaf in leaves]
    numbers = whole_model.summed(run, tree, [batch], _counted, zeros)
    return {
        leaf.name: int(jnp.sum(number))
        for leaf, number in zip(leaves, numbers, strict=True)
    }


def _counted(
    x: Float[Array, "*B d_in"], chip: chips.Chip
) -> tuple[Float[Array, "*B d_out"], Float[Array, ""]]:
    """Return numbers instead of a read, and the number of its vectors."""
    # Not zeros: a later layer may divide by its inputs' norm, and the count needs no product.
    y = jnp.broadcast_to(
        jnp.sum(x, axis=-1, keepdims=True), (*x.shape[:-1], chip.matrix_shape[1])
    )
    return y, jnp.float32(x.size // max(x.shape[-1], 1))


def with_read_key(model: Model, key: Array) -> Model:
    """Return the model with new noise for its next reads.

    The same key [] gives the same noise, so every step needs another one. Layers differ by path; a layer that is called
    several times in a step has the same noise each time.
    """
    graph, tree = nnx.split(model)
    return nnx.merge(graph, _keyed(tree, one_key(key)))


def _check_batches(batches: Any) -> None:
    if isinstance(batches, jax.Array | np.ndarray):
        raise ValueError(
            f"batches is one array of shape {batches.shape}: give a list of batches, such as [x]"
        )


def _keyed(tree: Any, key: Array) -> Any:
    """Return a model as a tree whose chips that read at random have keys, by path."""

    def own(chip: chips.Chip) -> Array | None:
        if chip.config.reads_at_random:
            return jax.random.fold_in(key, zlib.crc32(chip.name.encode()))
        return chip.key

    return chips.with_chips(
        tree, [chips.with_read_key(chip, own(chip)) for chip in chips.chips_in(tree)]
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    """A function of a model as one of its tree. Models of one structure are equal, so they compile once."""

    graph: Any
    function: Callable[..., Array]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, tree: Any, batch: Any) -> Array:
        model = nnx.merge(self.graph, tree)
        return self.function(model, batch, **dict(self.options))


def _outputs(model: Any, batch: Any, **options: Any) -> Float[Array, ""]:
    """Return one number that depends on every read."""
    y = model(*(batch if isinstance(batch, tuple) else (batch,)), **options)
    real = [
        leaf
        for leaf in jax.tree.leaves(y)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]
    return sum((jnp.sum(leaf, dtype=jnp.float32) for leaf in real), jnp.float32(0))


def _run(model: Any, options: Mapping[str, Any]) -> Callable[[Any, Any], Array]:
    """Return a model's outputs as a `_Run`, or another function where an option, such as an array, has no hash."""
    run = _Run(nnx.graphdef(model), _outputs, tuple(options.items()))
    try:
        hash(run)
    except TypeError:
        return lambda tree, batch: run(tree, batch)
    return run
