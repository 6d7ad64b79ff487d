"""Time of a training step on a mesh of devices: a small model that can be compared with measured points.

Every device maps or batches its own seeds, without communication between seeds:

    t = seeds / seed * (flops / (rate * model) + sums * (latency + bytes / bandwidth))

Matrices that are split over the axis `model` need sums over its devices: one after every matrix that is split by rows,
and another one in the backward pass. Work that is not split (norms and the fusion itself) is not treated separately.
"""

import dataclasses

from lorafusion_jax import Architecture, Update
from lorafusion_jax.parts import Shape, step_flops, tokens

_ITEM = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured rates of one device.

    Attributes:
      flops: FLOPs per second of a training step on one device.
      bandwidth: bytes per second that a sum over devices moves on each.
      latency: fixed time of a sum, in seconds.
    """

    flops: float
    bandwidth: float
    latency: float


def sums(config: Architecture) -> int:
    """Return the number of sums over the axis `model` in a step, forward and backward."""
    return 2 * sum(site.layers for site in config.sites.values() if site.split == "rows")


def sum_bytes(config: Architecture, shape: Shape, model: int) -> float:
    """Return the bytes that each device moves for all sums of a step, in a ring: 2 (model - 1) / model of the array.

    Args:
      config: the base model.
      shape: shape of one seed's batch.
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
      shape: shape of one seed's batch.
      update: the method's update of the adapted matrices.
      rates: rates of a device.
      trainable: number of trained parameters of one seed.
      seeds: number of seeds of the run.
      seed: size of the mesh's axis `seed`, a divisor of `seeds`.
      model: size of the mesh's axis `model`.

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
