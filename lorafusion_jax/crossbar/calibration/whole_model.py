"""Calibration and error report of a whole model, from its converters' inputs on a few batches.

Every programmed weight gets a tap with zeros of the shape of what its reads find, such as their statistics.
Differentiating the model with respect to these returns the sum over all reads, also from scans and repeated calls.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from ...support.platform import is_traced
from ..chip.chip import Chip, chips_in, reads, with_chips
from ..read.paths import PATHS
from .one_chip import (
    BINS,
    INPUT_BINS,
    STEPS,
    Statistics,
    calibrated,
    check_numbers,
    probe,
    with_chosen_bits,
)

Run = Callable[
    [Any, Any], Array
]  # (weights, batch) -> an array that depends on every product, such as logits
Counted = Callable[
    [Any, str], Bool[Array, "*B"]
]  # (batch, name of a chip) -> inputs [*B, d_in] that are no padding
TAPPED = "tapped"  # what taps find; a model whose `jax.checkpoint` saves this name computes it once
_NAMED = 5  # sites that a warning names


def calibrate_tree(
    run: Run,
    weights: Any,
    batches: Sequence[Any],
    *,
    tradeoff: float | None = None,
    sensitivities: Mapping[str, float] | None = None,
) -> Any:
    """Return the weights with converter ranges set from the inputs and sums of the batches.

    Use one function `run` for all calls, because each function is compiled once. Raises a ValueError if there are no
    batches, or if they do not read a weight.

    Args:
      run: function from weights and a batch to an array that depends on every product, such as logits.
      weights: tree with chips.
      batches: inputs, without labels.
      tradeoff: full conversions that an error power as large as that of the sums is worth: tables of ADC bits are
        chosen for it (see `with_chosen_bits`); None to keep the bits.
      sensitivities: factors of the error power by the names of chips; 1 for others.
    """
    statistics: list[Statistics] = []
    for _ in range(2 if any(chip.awaits_inputs for chip in chips_in(weights)) else 1):
        statistics = observe(run, weights, batches)
        leaves = chips_in(weights)
        weights = with_chips(
            weights,
            [
                _calibrated(leaf, seen)
                for leaf, seen in zip(leaves, statistics, strict=True)
            ],
        )
    if tradeoff is None:
        return weights
    factors = sensitivities or {}
    chosen = [
        with_chosen_bits(chip, seen, tradeoff, sensitivity=factors.get(chip.name, 1.0))
        for chip, seen in zip(chips_in(weights), statistics, strict=True)
    ]
    return with_chips(weights, chosen)


def observe(run: Run, weights: Any, batches: Iterable[Any]) -> list[Statistics]:
    """Return the statistics of every programmed weight, in the order of the tree; arguments as for `calibrate_tree`."""
    return summed(run, weights, batches, probe, list(map(_zeros, chips_in(weights))))


def summed(
    run: Run,
    weights: Any,
    batches: Iterable[Any],
    read: Callable[..., tuple[Array, Any]],
    zeros: list[Any],
    arguments: Sequence[tuple[Array, ...]] = (),
    counted: Counted | None = None,
) -> list[Any]:
    """Return what `read` finds at every chip, summed over all reads of the batches, in the order of the tree.

    Args:
      run: function from weights and a batch to an array that depends on every product, such as logits.
      weights: tree with chips.
      batches: inputs, without labels.
      read: function from x [..., d_in], a chip and its own arrays to x @ W [..., d_out], or what stands for it, and a
        tree of what was found. Use one for all calls, as for `run`.
      zeros: such a tree for every chip, without any read.
      arguments: arrays [*N, ...] of every chip, with the axes of its stack, if `read` needs some.
      counted: inputs that `read` meets; the others are zeros for it. By default all.
    """
    total = zeros
    batch = None
    arguments = arguments or [()] * len(zeros)
    chips = chips_in(weights)
    for number, batch in enumerate(batches):
        masks = [
            counted and _of_stack(counted(batch, chip.name), chip) for chip in chips
        ]
        sums = _found(
            total,
            weights,
            arguments,
            masks,
            batch,
            jnp.int32(number),
            run=run,
            read=read,
        )
        total = jax.tree.map(jnp.add, total, sums)
    if batch is None:
        raise ValueError(
            "there are no batches: give a few without labels, like those that the model will be used on"
        )
    return total


def site_errors(weights: Any, statistics: list[Statistics]) -> list[dict[str, Any]]:
    """Return a row for every matrix in arrays: its place, its signal to noise ratio, and the share that is clipped.

    Rows have {site, layer, module (None without such an axis), sqnr (dB, x @ W against its read), clipped (share of the
    conversions of the slice that clips most), clipped_inputs (share)}. Shares over `clip_share` warn.
    """
    rows = []
    clipping_rows: dict[str, list[Any]] = {"clipped": [], "clipped_inputs": []}
    for leaf, seen in zip(chips_in(weights), statistics, strict=True):
        site_rows = list(_rows(leaf, seen))
        rows += site_rows
        config = leaf.config
        for column, converter in (
            ("clipped", config.adc),
            ("clipped_inputs", config.dac),
        ):
            if converter is not None:
                clipping_rows[column] += [
                    row for row in site_rows if row[column] > converter.clip_share
                ]
    for column, problem in (
        ("clipped", "ADCs clip more conversions than adc.clip_share"),
        ("clipped_inputs", "DACs clip more inputs than dac.clip_share"),
    ):
        clipping = clipping_rows[column]
        if clipping:
            worst = sorted(clipping, key=lambda row, column=column: -row[column])
            sites = "; ".join(
                f"{_site_text(row)}: {row[column]:.1%}" for row in worst[:_NAMED]
            )
            rest = f"; and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
            warnings.warn(f"{problem}: {sites}{rest}", stacklevel=2)
    return rows


@functools.partial(jax.jit, static_argnames=("run", "read"))
def _found(
    zeros: list[Any],
    weights: Any,
    arguments: Sequence[tuple[Array, ...]],
    masks: Sequence[Array | None],
    batch: Any,
    number: Array,
    *,
    run: Run,
    read: Any,
) -> list[Any]:
    """Return what the reads of one batch find; only the shapes of `zeros` matter."""
    leaves = chips_in(reads(weights, number))

    def total(zeros: list[Any]) -> Array:
        tapped = [
            dataclasses.replace(leaf, tap=_Tap(found, arrays, mask, read))
            for leaf, found, arrays, mask in zip(
                leaves, zeros, arguments, masks, strict=True
            )
        ]
        return jnp.sum(run(with_chips(weights, tapped), batch))

    return jax.grad(total)(zeros)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tap:
    found: Any
    own: tuple[Array, ...]
    counted: Bool[Array, "*B"] | None
    read: Callable[..., tuple[Array, Any]] = dataclasses.field(
        metadata={"static": True}
    )

    def collect(
        self, x: Float[Array, "*B d_in"], chip: Chip
    ) -> Float[Array, "*B d_out"]:
        """Return `read`'s product, and what it finds as the gradient of `found`; other gradients are zero."""
        if self.counted is not None:
            x = jnp.where(self.counted[..., None], x, 0)
        arrays, tree = jax.tree.flatten((chip, *self.own))
        return _tapped((self.read, tree), x, tuple(jax.tree.leaves(self.found)), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(
    read_and_tree: tuple[Any, Any],
    x: Float[Array, "*B d_in"],
    zeros: tuple[Array, ...],
    arrays: list[Any],
) -> Float[Array, "*B d_out"]:
    return _tapped_forward(read_and_tree, x, zeros, arrays)[0]


def _tapped_forward(read_and_tree, x, statistics, arrays):
    read, tree = read_and_tree
    y, statistics = read(x, *jax.tree.unflatten(tree, arrays))
    leaves = tuple(
        checkpoint_name(leaf, TAPPED) for leaf in jax.tree.leaves(statistics)
    )
    return y, (jnp.zeros_like(x), leaves, None)


_tapped.defvjp(_tapped_forward, lambda read_and_tree, gradients, cotangent: gradients)


def _of_stack(mask: Bool[Array, "*B"], chip: Chip) -> Bool[Array, "..."]:
    return jnp.broadcast_to(mask, (*chip.shape[:-2], *mask.shape))


def _zeros(leaf: Chip) -> Statistics:
    lead = leaf.shape[:-2]
    dtype = leaf.codes.dtype
    slices = len(leaf.config.weight_slices)
    shapes = ((slices, BINS), (slices, STEPS), (slices,), (INPUT_BINS,), (), (), ())
    return Statistics(*(jnp.zeros((*lead, *shape), dtype) for shape in shapes))


def _calibrated(leaf: Chip, seen: Statistics) -> Chip:
    adc = leaf.config.adc
    if leaf.correction is not None and (
        leaf.limits is not None or leaf.input_limit is not None
    ):
        return leaf  # its correction belongs to these ranges
    if not leaf.awaits_inputs and (
        adc is None or adc.range != "calibrated" or not PATHS[leaf.plan.path].converts
    ):
        return leaf
    if is_traced(seen):
        raise ValueError(
            "calibration sets ranges from values, which jax.jit and jax.vmap hide: calibrate outside of them, one "
            "model at a time, and stack the models: jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)"
        )
    if idle := np.argwhere(~np.asarray(seen.read)).tolist():
        where = _site_text(_names(leaf, tuple(idle[0])))
        raise ValueError(
            f"{where} was read by none of the batches: give batches, and modules, that use all arrays"
        )
    return calibrated(leaf, seen)


def _rows(leaf: Chip, seen: Statistics) -> Iterator[dict[str, Any]]:
    """Yield a row for every matrix that was read."""
    check_numbers(leaf, seen.signal)
    sqnr = np.asarray(seen.sqnr)
    signal = np.asarray(seen.signal)
    clipped = np.max(np.asarray(seen.clip_share), axis=-1)
    inputs = np.asarray(seen.clip_share_of_inputs)
    for place in np.ndindex(sqnr.shape):
        if signal[place] > 0:
            shares = {
                "clipped": clipped[place].item(),
                "clipped_inputs": inputs[place].item(),
            }
            yield _names(leaf, place) | {"sqnr": sqnr[place].item()} | shares


def _names(leaf: Chip, place: tuple[int, ...]) -> dict[str, Any]:
    layer, module = (*place, None, None)[:2]
    return {"site": leaf.name, "layer": layer, "module": module}


def _site_text(names: dict[str, Any]) -> str:
    numbers = [
        f"{axis} {names[axis]}"
        for axis in ("layer", "module")
        if names[axis] is not None
    ]
    return ", ".join([names["site"] or "the model", *numbers])
