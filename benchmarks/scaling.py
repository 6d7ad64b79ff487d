"""Time of a step on several devices: a prediction against measurements on a CPU's cores.

    python benchmarks/scaling.py [--shape flan-t5-small] [--seeds 4] [--json]

Every point is a process of its own with as many cores as devices (XLA's forced host devices): one core alone gives the
rate of a device, sums of arrays over two give bandwidth and latency. Then seeds are shared out over two devices, and
matrices. They are compared with one device on two cores. The step of `fusion_step.py`: `mix`, float32,
layers in a loop.

Every device maps or batches its own seeds, without communication between seeds:

    t = seeds / seed * (flops / (rate * model) + sums * (latency + bytes / bandwidth))

Matrices that are split over the axis `model` need sums over its devices: one after every matrix that is split by rows,
and another one in the backward pass. Work that is not split (norms and the fusion itself) is not treated separately.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _measure import case, in_turns
from _model import (
    BATCH,
    CHOICES,
    MODULES,
    RANK,
    SOURCE,
    TARGET,
    Step,
    config_of,
    frozen,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorafusion_jax import Architecture, FusionRecipe
from lorafusion_jax.estimates import (
    Settings,
    Shape,
    program_of,
)
from lorafusion_jax.training import make_mesh, on_mesh

# measured / predicted, either way
_REQUIRED = 1.25
_AMBITION = 1.1
_SHAPE = Shape(BATCH, SOURCE, TARGET)
_ITEM = {"float32": 4, "bfloat16": 2}


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument(
        "--shape", choices=CHOICES, default="flan-t5-small", help="of the base model"
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point is not None:
        print(
            json.dumps(
                _point(options.shape, options.seeds, options.rounds, options.point)
            )
        )
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("two cores are needed: this process may run on one alone")
    one = _measured(options, cores[:1], 1, "seed=1")
    threads = _measured(options, cores[:2], 1, "seed=1")
    seeds = _measured(options, cores[:2], 2, "seed=2")
    matrices = _measured(options, cores[:2], 2, "model=2")
    config = config_of(options.shape)
    recipe = FusionRecipe(modules=MODULES, composition="mix")
    settings = Settings(recipe=recipe, rank=RANK, seeds=1)
    flops = program_of(config, "fusion", settings, "step", _SHAPE).flops
    rates = Rates(
        options.seeds * flops / one["seconds"],
        matrices["bandwidth"],
        matrices["latency"],
    )
    cases = []
    for name, point, axis in (
        ("seeds", seeds, "seed"),
        ("matrices", matrices, "model"),
    ):
        predicted = step_seconds(config, rates, flops, options.seeds, **{axis: 2})
        off = max(point["seconds"] / predicted, predicted / point["seconds"])
        what = f"{options.shape}, {options.seeds} seeds, {name} over 2 devices: measured / predicted, either way"
        cases.append(
            case(
                what,
                off,
                _REQUIRED,
                _AMBITION,
                predicted=predicted,
                measured=point["seconds"],
                **rates._asdict(),
            )
        )
    cases.append(
        case(
            f"{options.shape}, {options.seeds} seeds: over 2 devices / on one with 2 cores",
            seeds["seconds"] / threads["seconds"],
            1.0,
            0.8,
            seeds_over_devices=seeds["seconds"],
            one_device=threads["seconds"],
            one_core=one["seconds"],
        )
    )
    _measure.show(cases, as_json=options.json)


class Rates(NamedTuple):
    """FLOPs per second of one device, bytes per second that a sum over devices moves on each, and a sum's seconds."""

    flops: float
    bandwidth: float
    latency: float


def sums(config: Architecture) -> int:
    """Return the number of sums over the axis `model` in a step, forward and backward."""
    return 2 * sum(
        site.layers for site in config.sites.values() if site.split == "rows"
    )


def sum_bytes(config: Architecture, shape: Shape, model: int) -> float:
    """Return the bytes that each device moves for all sums of a step, in a ring: 2 (model - 1) / model of the array."""
    by_rows = [site for site in config.sites.values() if site.split == "rows"]
    array = (
        2
        * sum(s.layers * shape.tokens(s.reads) * s.d_out for s in by_rows)
        * _ITEM[config.dtype]
    )
    return 2 * (model - 1) / model * array


def step_seconds(
    config: Architecture,
    rates: Rates,
    flops: float,
    seeds: int,
    *,
    seed: int = 1,
    model: int = 1,
) -> float:
    """Return the seconds of a step of all seeds, of so many FLOPs each, on the axes `seed`, a divisor, and `model`."""
    exchange = 0.0
    if model > 1:
        exchange = (
            sums(config) * rates.latency
            + sum_bytes(config, _SHAPE, model) / rates.bandwidth
        )
    return seeds // seed * (flops / (rates.flops * model) + exchange)


def _measured(
    options: Any, cores: list[int], devices: int, mesh: str
) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--shape",
        options.shape,
        "--seeds",
        str(options.seeds),
    ]
    command += ["--rounds", str(options.rounds), "--point", mesh]
    forced = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        command,
        env=_measure.MALLOC | os.environ | forced,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return json.loads(done.stdout.splitlines()[-1])


def _point(shape: str, seeds: int, rounds: int, mesh: str) -> dict[str, float]:
    """Return the seconds of a step of all seeds on a mesh, and what sums over its axis `model` cost."""
    config = config_of(shape)
    with (
        contextlib.nullcontext()
        if mesh == "seed=1"
        else jax.set_mesh(make_mesh(mesh, seeds))
    ):
        step = Step(
            config,
            on_mesh(frozen(config, "float32", MODULES), config),
            "mix",
            seeds=seeds,
        )
        for name in ("state", "batches", "rates"):
            setattr(step, name, on_mesh(getattr(step, name), config, of_seeds=True))
        step.problem = step.problem.replace(
            index=on_mesh(step.problem.index, of_seeds=True)
        )
        found = {"seconds": float(np.median(in_turns({"step": step}, rounds)["step"]))}
        if "model" not in mesh:
            return found
        # A sum of one number is latency, one of a layer's activations bandwidth: a ring of two moves the array once.
        numbers = BATCH * SOURCE * config.d_model
        took = in_turns(
            {"one": _sum_over_devices(1), "many": _sum_over_devices(numbers)}, rounds
        )
        latency = float(np.median(took["one"]))
        many = float(np.median(took["many"]))
        return found | {
            "latency": latency,
            "bandwidth": 4 * numbers / max(many - latency, 1e-9),
        }


def _sum_over_devices(width: int) -> Callable[[], Any]:
    mesh = jax.sharding.get_mesh()
    parts = jax.device_put(
        jnp.ones((mesh.size, width)), NamedSharding(mesh, P("model"))
    )
    total = jax.jit(
        jax.shard_map(
            lambda a: jax.lax.psum(a, "model"), in_specs=P("model"), out_specs=P()
        )
    )
    return lambda: jax.block_until_ready(total(parts))


if __name__ == "__main__":
    main()
