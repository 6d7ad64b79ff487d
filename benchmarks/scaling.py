"""A step's time against devices: what `train.scaling` foretells against what is measured on a CPU's cores.

    python benchmarks/scaling.py [--shape flan-t5-small] [--seeds 4] [--repeats 5] [--json]

Every point is a process of its own with as many cores as devices (XLA's forced host devices): one core alone gives the
rate of a device, sums of arrays over two give bandwidth and latency. Then seeds are shared out over two devices, and
matrices. Beside them stands what one device makes of two cores by itself. A pool of 20 random modules of rank 16 on q
and v, batches of 5 rows of 128 source and 8 target tokens, float32, `mix`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

_REQUIRED = 1.25  # measured / foretold, either way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="flan-t5-small", help="of the base model")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed; the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point is not None:
        _, mesh = options.point.split(":")
        print(json.dumps(_point(options.shape, options.seeds, options.repeats, mesh)))
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("two cores are needed: this process may run on one alone")
    one = _measured(options, cores[:1], 1, "")
    two = _measured(options, cores[:2], 2, "model=2")
    seeds = _measured(options, cores[:2], 2, "seed=2")
    threads = _measured(options, cores[:2], 1, "")
    rates = {"flops": one["flops"] / one["seconds"], "bandwidth": two["bandwidth"], "latency": two["latency"]}
    cases = [
        _case("seeds over 2 devices", options, rates, seeds, {"seed": 2}),
        _case("matrices over 2 devices", options, rates, two, {"model": 2}),
        {
            "name": "seeds over 2 devices / one device with 2 cores",
            "ratio": seeds["seconds"] / threads["seconds"],
            "required": 1.0,
            "ambition": 0.8,
            "higher_is_better": False,
            "computed_from": {"seeds over 2 devices": seeds["seconds"], "one device": threads["seconds"]},
        },
    ]
    if options.json:
        print(json.dumps({"shape": options.shape, "seeds": options.seeds, "rates": rates, "cases": cases}, indent=1))
        return
    print(f"{options.shape}, {options.seeds} seeds; a device (one core): {rates['flops'] / 1e9:.1f} GFLOP/s")
    print(f"sums over devices: {rates['bandwidth'] / 1e9:.2f} GB/s, {1e6 * rates['latency']:.0f} us each")
    for case in cases:
        print(f"{case['name']}: {case['ratio']:.2f} ({case['computed_from']})")


def _case(name: str, options: Any, rates: dict[str, float], point: dict[str, Any], mesh: dict[str, int]) -> dict:
    from lorafusion_jax.train.scaling import Rates, step_seconds

    config, shape, update, trainable = _workload(options.shape)
    told = step_seconds(config, shape, update, Rates(**rates), trainable=trainable, seeds=options.seeds, **mesh)
    found = point["seconds"]
    return {
        "name": name,
        "ratio": max(found / told, told / found),
        "required": _REQUIRED,
        "ambition": 1.1,
        "higher_is_better": False,
        "computed_from": {"foretold": told, "measured": found},
    }


def _measured(options: Any, cores: list[int], devices: int, mesh: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--shape", options.shape, "--seeds", str(options.seeds)]
    command += ["--repeats", str(options.repeats), "--point", f"{devices}:{mesh}"]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return json.loads(done.stdout.splitlines()[-1])


def _workload(shape: str) -> tuple:
    from lorafusion_jax.params import SHAPES
    from lorafusion_jax.train.cost import Shape
    from lorafusion_jax.train.estimate import Settings, trainable_count, update_of

    config, settings = SHAPES[shape], Settings()
    trainable = trainable_count(config, "fusion-mix", settings)
    return config, Shape(5, 128, 8), update_of("fusion-mix", settings), trainable


def _point(shape: str, seeds: int, repeats: int, mesh: str) -> dict[str, Any]:
    """Return the median time of a step, its operations, and what sums over the mesh cost."""
    import contextlib
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from lorafusion_jax.fusion.compose import gram
    from lorafusion_jax.fusion.pool import LoraPool
    from lorafusion_jax.models.sites import targeted
    from lorafusion_jax.models.t5 import T5, kernels
    from lorafusion_jax.tasks import Batch
    from lorafusion_jax.train.cost import step_flops
    from lorafusion_jax.train.fit import recipe_rates, train_seeds
    from lorafusion_jax.train.methods import Frozen, Fusion
    from lorafusion_jax.train.options import PRESETS
    from lorafusion_jax.train.sharding import make_mesh, on_mesh
    from lorafusion_jax.train.step import init_state

    config, size, update, trainable = _workload(shape)
    rng = np.random.default_rng(0)
    model, count, rank = T5(config, rngs=nnx.Rngs(0)), update.modules, update.rank
    adapted = targeted(config, update.targets)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape, scale=0.02), jnp.float32)

    pool = LoraPool(
        A={name: drawn(s.layers, count, s.d_in, rank) for name, s in adapted.items()},
        B={name: drawn(s.layers, count, rank, s.d_out) for name, s in adapted.items()},
        rank={name: jnp.full((s.layers, count), rank) for name, s in adapted.items()},
        names=tuple(map(str, range(count))),
    )
    used = {site: kernel for site, kernel in kernels(model).items() if site in adapted}
    graph, base = nnx.split(model)
    method, recipe = Fusion(composition="mix"), PRESETS["default"]
    with jax.set_mesh(make_mesh(mesh, seeds)) if mesh else contextlib.nullcontext():
        frozen = on_mesh(Frozen(base, pool, jax.jit(gram)(pool, used)))
        index = jnp.tile(jnp.arange(count), (seeds, 1))
        keys = jax.random.split(jax.random.key(0), seeds)
        state = jax.jit(jax.vmap(functools.partial(init_state, method, frozen)))(index, keys)
        batch = Batch(
            rng.integers(2, config.vocab_size, (seeds, size.rows, size.source), np.int32),
            np.ones((seeds, size.rows, size.source), bool),
            rng.integers(2, config.vocab_size, (seeds, size.rows, size.target), np.int32),
            np.ones((seeds, size.rows), bool),
        )
        rates = recipe_rates(recipe, seeds)
        state, batch, index, rates = (on_mesh(part, of_seeds=True) for part in (state, batch, index, rates))
        static = {"graph": graph, "method": method, "optimisation": recipe.optimisation(1000), "path": "map"}

        def step() -> None:
            nonlocal state
            state, _ = train_seeds(state, batch, index, frozen, rates, **static)
            jax.block_until_ready(state)

        found = {
            "seconds": _median(step, repeats),
            "flops": seeds * step_flops(config, size, update, trainable=trainable),
        }
        if "model" not in mesh:
            return found
        # A sum of one number is latency, one of a layer's activations bandwidth: a ring of two moves the array once.
        numbers = size.rows * size.source * config.d_model
        times = [_median(_sum_over_devices(width), 20 * repeats) for width in (1, numbers)]
        return found | {"latency": times[0], "bandwidth": 4 * numbers / max(times[1] - times[0], 1e-9)}


def _sum_over_devices(width: int) -> Any:
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    mesh = jax.sharding.get_mesh()
    parts = jax.device_put(jnp.ones((mesh.size, width)), jax.sharding.NamedSharding(mesh, P("model")))
    total = jax.jit(jax.shard_map(lambda a: jax.lax.psum(a, "model"), in_specs=P("model"), out_specs=P()))
    return lambda: jax.block_until_ready(total(parts))


def _median(call: Any, repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
