"""Calibration of a chip's converters on a task's training rows."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..crossbar import calibrate_tree
from ..runs.setup import Setup
from ..tasks import Batch, Encoded, eval_batches
from ..training.frozen import Frozen
from ..training.loss import batch_logits
from ..training.mesh import to_host
from ..training.method import Method, Params
from ..training.problem import Problem

# Training rows that ADCs are calibrated on.
CALIBRATION_ROWS = 64


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
