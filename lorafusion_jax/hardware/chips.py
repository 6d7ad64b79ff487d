"""Several chips in one program, and chips that are drawn again at every step.

A fusion runs on one chip (`program`), on several, each seed on each of them (`on_every_chip`), or, to become robust on
any chip, every training step on another one (`redrawn`).

Axis letters: C chips, S seeds.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..adapters.norms import PairTerms
from ..crossbar import (
    Rules,
    Structure,
    calibrate_tree,
    chips_in,
    split_config,
    with_chips,
)
from ..models.weights import reads
from ..runs.setup import Setup
from ..tasks import Batch, Encoded, Split, eval_batches
from ..training.loss import batch_logits
from ..training.mesh import axis_size, on_mesh, over_seeds, to_host
from ..training.method import Frozen, Method, Params
from ..training.problem import Problem
from .program import Norms, Restored, program

_Tree = TypeVar("_Tree")

# Training rows that ADCs are calibrated on.
CALIBRATION_ROWS = 64
# A new chip at every step, or at every other one.
Steps = Literal["every", "other"]
# Ranges of ADC and DAC of every programmed weight, in the order of the tree; None without converter.
Limits = list[tuple[Float[Array, "..."] | None, Float[Array, "..."] | None]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Redrawn(Frozen):
    """Weights on a chip, which training steps leave for chips that they draw.

    Attributes:
      digital: weights that are written.
      values: arrays of the rules.
      key: key from which chips are drawn.
      structure: rules without their arrays.
      steps: steps that draw a chip; the others use the present chip.
      norm: weights that the magnitudes' norms are computed from.
    """

    digital: Frozen
    values: list[Any]
    key: Array
    structure: Structure = dataclasses.field(metadata={"static": True})
    steps: Steps = dataclasses.field(metadata={"static": True})
    norm: Norms = dataclasses.field(metadata={"static": True})

    def of_seed(self, number: Int[Array, ""]) -> Frozen:
        """Return the weights of one seed, which draws its own chips."""
        return dataclasses.replace(
            reads(self, number), key=jax.random.fold_in(self.key, number)
        )

    def per_layer(self) -> Frozen:
        """Return the weights unchanged: steps choose between stacks of this chip and of another one."""
        return self

    def of_step(self, step: Int[Array, ""], graph: nnx.GraphDef) -> Frozen:
        """Return the chip of one training step: the present one, or a new one with the same converters."""
        chip_of_step = reads(_plain(self), step)
        rules = dict(self.structure.config(self.values))
        key = jax.random.fold_in(self.key, step)
        new = _with_limits(
            program(graph, self.digital, rules, key, norm=self.norm),
            limits_of(chip_of_step),
        )
        new = reads(new, step)
        if self.steps == "every":
            return new
        return jax.tree.map(
            lambda a, b: jnp.where(step % 2 == 0, a, b), new, chip_of_step
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChipPerSeed(Frozen):
    """Weights on several chips: every leaf has a leading axis of chips, which a mesh splits.

    Attributes:
      chip_of_seed: place of the chip of each seed among those of its device.
    """

    split: ClassVar[PartitionSpec] = PartitionSpec("seed")

    chip_of_seed: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def of_seed(self, number: Int[Array, ""]) -> Frozen:
        """Return the weights on one seed's chip."""
        chip = jnp.array(self.chip_of_seed, jnp.int32)[number]
        return reads(jax.tree.map(lambda leaf: leaf[chip], _plain(self)), number)

    def per_layer(self) -> Frozen:
        """Return the weights unchanged: the first axis of a leaf is that of chips, not of layers."""
        return self


def redrawn(
    chip: Frozen,
    digital: Frozen,
    rules: Rules,
    key: PRNGKeyArray,
    *,
    steps: Steps,
    norm: Norms,
) -> Redrawn:
    """Return a chip that training steps leave for others; further arguments as for `program`."""
    structure, values = split_config(tuple(rules.items()))
    if isinstance(
        digital.gram, PairTerms
    ):  # every step would compute Gram terms instead
        digital = dataclasses.replace(digital, gram=chip.gram)
    return Redrawn(
        **_fields(chip),
        digital=digital,
        values=values,
        key=key,
        structure=structure,
        steps=steps,
        norm=norm,
    )


def calibrate(setup: Setup, params: Params, frozen: Frozen, *, rows: int) -> Frozen:
    """Return a chip whose ADC ranges cover the sums of some training rows, with the numbers of every seed."""
    run = logits_of(setup.problem.graph, setup.problem.method)
    return calibrate_tree(run, frozen, list(calibration_batches(setup, params, rows)))


def calibration_batches(
    setup: Setup, params: Mapping[str, Any], rows: int, *, batch_size: int = 64
) -> Iterator[tuple[Params, Int[Array, " N"], Batch]]:
    """Yield the training rows to calibrate on, with every seed's numbers."""
    params, indices = to_host((dict(params), setup.problem.index))
    some = Encoded(*(part[:rows] for part in (setup.train.inputs, setup.train.labels)))
    for _, batch in eval_batches(
        some, min(batch_size, len(some)), pad_id=setup.tokenizer.pad_token_id
    ):
        for seed, index in enumerate(indices):
            yield (
                jax.tree.map(lambda p, seed=seed: p[seed], params),
                jnp.asarray(index),
                batch,
            )


@functools.lru_cache  # the same function again: `crossbar.calibration` compiles once for each
def logits_of(
    graph: nnx.GraphDef, method: Method
) -> Callable[[Frozen, tuple[Params, Int[Array, " N"], Batch]], Float[Array, "B T V"]]:
    """Return the model as a function of frozen weights and of (params, index, batch) of one seed."""

    def run(frozen: Frozen, inputs: tuple[Params, Array, Batch]) -> Array:
        params, index, batch = inputs
        return batch_logits(
            params,
            batch,
            Problem(graph=graph, method=method, frozen=frozen, index=index),
        )[0]

    return run


def on_every_chip(
    setup: Setup,
    params: Params,
    rules: Rules,
    keys: Array,
    *,
    modules: Int[Array, " P"] | None,
    norm: Norms,
    calibration_rows: int = CALIBRATION_ROWS,
    restored: Sequence[Restored] = (),
) -> Setup:
    """Return the setup of S seeds on C chips: C * S seeds, each with a chip, or more on a mesh (see `for_every_chip`).

    ADC ranges are calibrated on the first chip, and are those of all. A device has the chips of its seeds alone.

    Args:
      setup: digital setup with a loop over layers.
      params: trained parameters of its seeds, for the calibration.
      rules: rules of all chips (see `program`).
      keys: [C], keys of the chips.
      modules: numbers of the pool's modules on the chips.
      norm: weights that the magnitudes' norms are computed from.
      calibration_rows: number of training rows to calibrate on.
      restored: digital corrections of each chip.
    """
    problem = setup.problem
    first = program(
        problem.graph,
        problem.frozen,
        rules,
        keys[0],
        modules=modules,
        norm=norm,
        restored=restored[0] if restored else None,
    )
    limits = limits_of(calibrate(setup, params, first, rows=calibration_rows))
    chip_of_seed, seed = _places(len(keys), len(problem.index))
    # The chips of a device follow each other; fewer than those of another device are filled up with the next ones.
    first_of_device = chip_of_seed.reshape(axis_size("seed"), -1)[:, :1]
    local_chip = chip_of_seed - np.repeat(
        first_of_device, len(seed) // len(first_of_device)
    )
    chip_numbers = np.minimum(
        first_of_device + np.arange(local_chip.max() + 1), len(keys) - 1
    ).ravel()
    on_chips = None
    if restored:
        on_chips = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(restored[n] for n in chip_numbers)
        )
    structure, values = split_config(tuple(rules.items()))
    weights = _program_all(
        on_mesh((keys[chip_numbers], on_chips), of_seeds=True),
        (problem.frozen, values, limits, modules),
        structure=structure,
        graph=problem.graph,
        norm=norm,
    )
    weights = on_mesh(weights, problem.config, of_seeds=True)
    frozen = ChipPerSeed(**_fields(weights), chip_of_seed=tuple(local_chip.tolist()))
    on_all = setup.with_problem(
        frozen=frozen, index=on_mesh(problem.index[seed], of_seeds=True)
    )
    return dataclasses.replace(
        on_all, split=setup.split and Split(*(rows[seed] for rows in setup.split))
    )


def for_every_chip(tree: _Tree, count: int) -> _Tree:
    """Return leaves of S seeds again for each of `count` chips; the last again until a mesh divides their number."""
    return on_mesh(
        jax.tree.map(lambda leaf: leaf[_places(count, len(leaf))[1]], tree),
        of_seeds=True,
    )


def _places(count: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of chip and seed of every seed on every chip, and the last again for a mesh."""
    size = axis_size("seed")
    padded = -(-count * seeds // size) * size
    return np.divmod(np.minimum(np.arange(padded), count * seeds - 1), seeds)


def limits_of(frozen: Frozen) -> Limits:
    """Return the ranges of a chip's ADCs and DACs."""
    return [(leaf.limits, leaf.input_limit) for leaf in chips_in(frozen)]


def _fields(frozen: Frozen) -> dict[str, Any]:
    return {
        field.name: getattr(frozen, field.name) for field in dataclasses.fields(Frozen)
    }


def _plain(frozen: Frozen) -> Frozen:
    """Return the weights alone."""
    return Frozen(**_fields(frozen))


@functools.partial(jax.jit, static_argnames=("structure", "graph", "norm"))
def _program_all(
    chips: tuple[Array, Restored | None],
    shared: tuple[Frozen, list[Any], Limits, Int[Array, " P"] | None],
    *,
    structure: Structure,
    graph: nnx.GraphDef,
    norm: Norms,
) -> Frozen:
    def of_chip(chip: tuple[Array, Restored | None], shared: Any) -> Frozen:
        key, restored = chip
        digital, values, limits, modules = shared
        weights = program(
            graph,
            digital,
            dict(structure.config(values)),
            key,
            modules=modules,
            norm=norm,
            restored=restored,
        )
        return _with_limits(weights, limits)

    return over_seeds(of_chip, "sequential")(chips, shared)


def _with_limits(frozen: Frozen, limits: Limits) -> Frozen:
    """Return a chip whose converters have these ranges; corrected weights keep the ranges of their corrections."""
    leaves = []
    for leaf, (adc_limits, dac_limit) in zip(chips_in(frozen), limits, strict=True):
        dac = leaf.config.dac
        if leaf.correction is None:
            leaf = dataclasses.replace(leaf, limits=adc_limits)
            if dac is not None and dac.scaling == "calibrated":
                leaf = dataclasses.replace(leaf, input_limit=dac_limit)
        leaves.append(leaf)
    return with_chips(frozen, leaves)
