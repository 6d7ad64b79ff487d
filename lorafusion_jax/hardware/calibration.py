"""Calibration of a chip's converters on a task's training rows."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from ..crossbar import calibrate_tree
from ..methods.method import Frozen, Method, Params
from ..runs.prepare import Setup
from ..tasks import Batch, Encoded, eval_batches
from ..training.step import batch_logits


def calibrate(setup: Setup, params: Params, frozen: Frozen, *, rows: int) -> Frozen:
    """Return a chip whose ADC ranges cover what the training rows bring to them, with every seed's numbers.

    Args:
      setup: of the run.
      params: leaves with a leading axis of seeds.
      frozen: the chip.
      rows: how many of the training rows.
    """
    return calibrate_tree(logits_of(setup.graph, setup.method), frozen, list(calibration_batches(setup, params, rows)))


def calibration_batches(
    setup: Setup, params: Mapping[str, Any], rows: int, *, batch_size: int = 64
) -> Iterator[tuple[Params, Array, Batch]]:
    """Yield the training rows to calibrate on, with every seed's numbers."""
    some = Encoded(*(part[:rows] for part in (setup.train.inputs, setup.train.labels)))
    for _, batch in eval_batches(some, min(batch_size, len(some)), pad_id=setup.tokenizer.pad_token_id):
        for seed in range(setup.index.shape[0]):
            yield jax.tree.map(lambda p, seed=seed: p[seed], dict(params)), setup.index[seed], batch


@functools.lru_cache  # the same function again: `crossbar.calibration` compiles once for each
def logits_of(graph: nnx.GraphDef, method: Method) -> Callable[[Frozen, tuple[Params, Array, Batch]], Array]:
    """Return the model as `crossbar.calibration` runs it: of frozen weights and (params, index, batch) of one seed."""

    def run(frozen: Frozen, inputs: tuple[Params, Array, Batch]) -> Array:
        params, index, batch = inputs
        return batch_logits(params, batch, index, frozen, graph=graph, method=method)[0]

    return run


def looped(setup: Setup) -> Setup:
    """Return the setup with a loop over layers: reads compile slowly, and unrolled ones as often as layers."""
    model = nnx.merge(setup.graph, setup.frozen.base)
    model.config = dataclasses.replace(model.config, unroll=False)
    return dataclasses.replace(setup, graph=nnx.split(model)[0])
