"""Machines by name with their peak rates, and the time and cost of jobs on them."""

import dataclasses
import functools
import heapq
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from ..models.architecture import Architecture
from ..support.checks import at_least
from ..support.options import PlanFlagOptions
from ..support.platform import cores, for_cpu
from ..training.mesh import SeedMode, default_seed_mode
from .estimate import Device
from .workload import Shape


class Machine(NamedTuple):
    """A machine to plan for.

    Attributes:
      device: kind of device that programs run on.
      seed_mode: default mode of the seeds.
      capacity: bytes of the device's memory, as its maker or the system states them; None if they are not known.
      peak: FLOP/s by dtype, for dense matrices; empty if they are not known.
      measured: the rate is measured on this machine's CPU.
      note: a sentence about it for the plan.
    """

    device: Device
    seed_mode: SeedMode
    capacity: int | None = None
    peak: Mapping[str, float] = {}
    measured: bool = False
    note: str = ""


def _accelerator(gigabytes: int, bfloat16: float, float32: float) -> Machine:
    """Return an accelerator, with its peaks in TFLOP/s."""
    peak = {"bfloat16": bfloat16 * 1e12, "float32": float32 * 1e12}
    return Machine("accelerator", "batched", gigabytes * 10**9, peak)


# NVIDIA's data sheets of A100 SXM 80 GB, H100 SXM, H200 SXM and L4, without sparsity; GeForce RTX 4090: NVIDIA's Ada
# whitepaper, with float32 sums. TPUs: Google Cloud's pages of v5e, v5p and v6e. By JAX's default precision, GPUs
# multiply float32 in TF32, and TPUs in bfloat16.
_ACCELERATORS: dict[str, Machine] = {
    "a100": _accelerator(80, 312.0, 156.0),
    "h100": _accelerator(80, 989.0, 494.0),
    "h200": _accelerator(141, 989.0, 494.0),
    "l4": _accelerator(24, 121.0, 60.0),
    "rtx4090": _accelerator(24, 165.0, 82.6),
    "v5e": _accelerator(16, 197.0, 197.0),
    "v5p": _accelerator(95, 459.0, 459.0),
    "v6e": _accelerator(32, 918.0, 918.0),
}
_MAC = re.compile(r"mac-([1-9][0-9]{0,3})gb")
_ON_A_MAC = "On a Mac the plan counts with JAX's CPU backend; JAX's Metal backend is not tested."
# Of the peak, a guess, and of a CPU's measured product: fusions took 1.24 of the planned CPU seconds with the embedded
# base and 0.87 with SmolLM2.
_SHARES: dict[Device, float] = {"accelerator": 0.3, "cpu": 0.5}


def machine(name: str | None) -> Machine:
    """Return a machine by its name, such as cpu, h100 or mac-64gb; this one without a name.

    Raises:
      ValueError: a name that is not in the table.
    """
    if name is None and not for_cpu():
        return Machine("accelerator", default_seed_mode())
    if name is None or name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine("cpu", "sequential", memory, measured=True)
    if name in _ACCELERATORS:
        return _ACCELERATORS[name]
    if mac := _MAC.fullmatch(name):
        gigabytes = int(mac[1])
        return Machine("cpu", "sequential", gigabytes * 2**30, note=_ON_A_MAC)
    names = ", ".join(["cpu", *_ACCELERATORS])
    raise ValueError(
        f"no machine {name!r}: choose of {names}, or a Mac by its unified memory, such as mac-64gb"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(PlanFlagOptions):
    """Options of `--plan`.

    Attributes:
      plan_for: plan for this machine instead of the one that the command runs on: cpu, a100, h100, h200, l4, rtx4090,
        v5e, v5p, v6e, or a Mac by its unified memory, such as mac-64gb.
      utilisation: share of the machine's peak that the plan counts with; by default 0.3, and on a CPU 0.5 of the rate
        of a matrix product that the plan measures.
      price: price of an hour of the device, to print the cost.
      devices: number of devices that share the jobs, to print the wall time.
    """

    plan_for: Annotated[str | None, tyro.conf.arg(name="for")] = None
    utilisation: float | None = None
    price: float | None = None
    devices: int | None = None

    def check_plan(self) -> None:
        """Raise ValueError for options of a plan without `--plan`, or with values that no machine has."""
        set_options = {
            "for": self.plan_for,
            "utilisation": self.utilisation,
            "price": self.price,
            "devices": self.devices,
        }
        for name, value in set_options.items():
            if value is not None and not self.plan:
                raise ValueError(
                    f"--{name} {value} is an option of a plan: add --plan, or leave it out"
                )
        if self.utilisation is not None and not 0 < self.utilisation <= 1:
            raise ValueError(
                f"utilisation is {self.utilisation}: expected a share of the peak, above 0 and at most 1"
            )
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ValueError(
                f"price is {self.price}: expected the price of a device's hour, 0 or more"
            )
        at_least(1, devices=self.devices)
        if self.plan:
            machine(self.plan_for)


class Pace(NamedTuple):
    """Rate at which a machine computes, and its description."""

    flops: float  # per second
    source: str


def pace(options: PlanOptions, config: Architecture, step: Shape) -> Pace | None:
    """Return the pace of a machine for a model whose training steps have a shape; None if its rate is not known."""
    where = machine(options.plan_for)
    share = (
        _SHARES[where.device] if options.utilisation is None else options.utilisation
    )
    if where.measured:
        site = max(
            config.sites.values(), key=lambda site: site.layers * site.d_in * site.d_out
        )
        product = (step.tokens(site.reads), site.d_in, site.d_out)
        count = cores()
        rate = count * _measured(product, config.dtype)
        a, b, c = product
        return Pace(
            share * rate,
            f"{share:g} of {_rate(rate)}, measured: {a} x {b} by {b} x {c}, {count} cores",
        )
    if not where.peak:
        return None
    peak = where.peak[config.dtype]
    return Pace(
        share * peak,
        f"{share:g} of the {_rate(peak)} of {options.plan_for} in {config.dtype}",
    )


@functools.cache
def _measured(product: tuple[int, int, int], dtype: str) -> float:
    """Return the FLOP/s of a core of this CPU in a matrix product and that of its gradient.

    CPU seconds are measured, so that other work on the machine makes no difference.
    """
    rows, d_in, d_out = product
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x = jnp.ones((rows, d_in), dtype)
        W = jnp.ones((d_out, d_in), dtype)
        both = jax.jit(lambda x, W: x @ W.T @ W)
        both(x, W).block_until_ready()
        count = 0
        began = time.process_time()
        while (seconds := time.process_time() - began) < _CALIBRATION:
            both(x, W).block_until_ready()
            count += 1
    return 4 * math.prod(product) * count / seconds


_CALIBRATION = 0.2  # CPU seconds


def spent(jobs: Iterable[float], at: Pace | None, options: PlanOptions) -> str:
    """Return a description of the time and the cost of jobs, given by their FLOPs.

    Raises:
      ValueError: the machine has no known rate, and a time or a cost is asked for.
    """
    if at is None:
        if (options.utilisation, options.price, options.devices) != (None, None, None):
            raise ValueError(
                "the rate of this machine is not known: name another one with --for"
            )
        return "Time: not known; name another machine with --for."
    seconds = [flops / at.flops for flops in jobs]
    total = sum(seconds)
    devices = options.devices or 1
    ends = [0.0] * min(devices, len(seconds))
    for job in sorted(
        seconds, reverse=True
    ):  # the longest first, to the device that is free first
        heapq.heapreplace(ends, ends[0] + job)
    text = f"Time at {at.source} (--utilisation), without compilation: {duration(total)} on one device"
    text += f", {duration(max(ends))} on {devices}." if devices > 1 else "."
    if options.price is not None:
        text += f" At {options.price:g} an hour: {total / 3600 * options.price:,.2f}."
    return text


def duration(seconds: float) -> str:
    """Return a time in hours, or in smaller units below an hour."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.2g} s"


def _rate(flops: float) -> str:
    return (
        f"{flops / 1e12:g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.0f} GFLOP/s"
    )
