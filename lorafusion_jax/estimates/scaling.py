"""How long a training step takes on a mesh of devices: a small model, to be held against measured points.

Every device maps or batches its own seeds, which exchange nothing:

    t = seeds / seed * (flops / (rate * model) + sums * (latency + bytes / bandwidth))

Matrices over the axis `model` cost sums over its devices: one after every matrix that is split by rows, and the same
again backward. What is not split, norms and the fusion's own work, is not told apart.
"""

import dataclasses

from ..methods.method import Update
from ..models.architecture import Architecture
from .flops import Shape, step_flops, tokens

_ITEM = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What one device does, measured.

    Attributes:
      flops: a second, of a training step on it alone.
      bandwidth: bytes a second that a sum over devices moves on each.
      latency: seconds that any sum takes.
    """

    flops: float
    bandwidth: float
    latency: float


def sums(config: Architecture) -> int:
    """Return how many sums over the axis `model` a step takes, forward and backward."""
    return 2 * sum(site.layers for site in config.sites.values() if site.split == "rows")


def sum_bytes(config: Architecture, shape: Shape, model: int) -> float:
    """Return the bytes that each device moves for all sums of a step, in a ring: 2 (model - 1) / model of the array.

    Args:
      config: the base model.
      shape: of one seed's batch.
      model: size of the axis.
    """
    by_rows = [site for site in config.sites.values() if site.split == "rows"]
    array = 2 * sum(s.layers * tokens(s.reads, shape) * s.d_out for s in by_rows) * _ITEM[config.dtype]
    return 2 * (model - 1) / model * array


def step_seconds(
    config: Architecture,
    shape: Shape,
    update: Update,
    rates: Rates,
    *,
    trainable: int,
    seeds: int,
    seed: int = 1,
    model: int = 1,
) -> float:
    """Return the seconds of one training step of all seeds.

    Args:
      config: the base model.
      shape: of one seed's batch.
      update: of the method.
      rates: of a device.
      trainable: numbers, of one seed.
      seeds: of the run.
      seed: size of that axis of the mesh, a divisor of `seeds`.
      model: size of that axis.

    Raises:
      ValueError: the seeds cannot be shared out evenly.
    """
    if seeds % seed:
        raise ValueError(f"{seeds} seeds cannot be shared out evenly over {seed}: give a divisor")
    compute = step_flops(config, shape, update, trainable=trainable) / (rates.flops * model)
    exchange = 0.0
    if model > 1:
        exchange = sums(config) * rates.latency + sum_bytes(config, shape, model) / rates.bandwidth
    return seeds // seed * (compute + exchange)
