"""Memory of fusing from a pool that is larger than what is at hand: what is not chosen is not read.

    python benchmarks/pool_memory.py [--shape flan-t5-large] [--adapters 196] [--modules 20] [--basis 32] [--json]

A random base and random adapters of rank 16 on q and v (20 different ones, over and over) are written to a temporary
folder. Processes of their own convert the adapters, load all of the pool, take steps with a few modules of it, and
steps with all of them in 4 bits, as `--load-in nf4` does, make a shared basis of all, and load it; their peaks are the
system's (VmHWM) above their imports. Batches of 5 rows of 128 source and 8 target tokens. FLAN-T5-large's
shape takes 12 GiB of disk.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _adapters import write_adapters, write_config
from _measure import case, memory
from _model import BATCH, SOURCE, TARGET, batch_of, config_of
from flax import nnx

from lorafusion_jax import (
    PRESETS,
    Frozen,
    Fusion,
    Problem,
    gram,
    kernels,
    load_base,
    load_basis,
    load_pool,
    save_base,
)
from lorafusion_jax.io import ConvertOptions, add_basis, convert
from lorafusion_jax.models import family_of, known_shapes
from lorafusion_jax.training import recipe_rates, start, train_seeds

_BAR = 8 * 2**30
# Of a basis of FLAN-T5-large: seconds on two cores and bytes to make it, bytes of it in memory.
_MAKE_SECONDS = 180
_MAKE_BYTES = 6 * 2**30
_BASIS_BYTES = 0.3 * 2**30
_STEPS = 3


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument(
        "--shape",
        choices=list(known_shapes()),
        default="flan-t5-large",
        help="of the base model",
    )
    parser.add_argument("--adapters", type=int, default=196, help="in the pool")
    parser.add_argument("--modules", type=int, default=20, help="that one fusion mixes")
    parser.add_argument(
        "--basis", type=int, default=32, help="directions of the shared basis"
    )
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point is not None:
        print(json.dumps(_point(*options.point)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, options.shape, options.adapters)
        converted = _measured(folder, options.adapters, "convert")
        loaded = _measured(folder, options.adapters, "load")
        few = _measured(folder, options.modules, "full")
        every = _measured(folder, options.adapters, "nf4")
        made = _measured(folder, options.basis, "make basis")
        basis = _measured(folder, options.basis, "load basis")
    size = f"{options.adapters} adapters of {options.shape}'s shape"
    cases = [
        case(
            f"{size} converted: peak / bytes of the output",
            converted["peak"] / converted["bytes"],
            2.0,
            0.1,
            **converted,
        ),
        case(
            f"{size} loaded: peak / bytes of the pool",
            loaded["peak"] / loaded["pool"],
            1.25,
            1.05,
            **loaded,
        ),
        case(
            f"{options.modules} of {size} fused: peak / 8 GiB",
            few["peak"] / _BAR,
            1.0,
            0.75,
            **few,
        ),
        case(
            f"{size} fused, all in 4 bits: peak / 8 GiB",
            every["peak"] / _BAR,
            1.0,
            0.75,
            **every,
        ),
        case(
            f"basis of {options.basis} of {size} made: seconds / 180",
            made["seconds"] / _MAKE_SECONDS,
            1.0,
            **made,
        ),
        case(
            f"basis of {options.basis} of {size} made: peak / 6 GiB",
            made["peak"] / _MAKE_BYTES,
            1.0,
            **made,
        ),
        case(
            f"basis of {options.basis} of {size}: bytes / 0.3 GiB",
            basis["basis"] / _BASIS_BYTES,
            1.0,
            **basis,
        ),
    ]
    _measure.show(cases, as_json=options.json)


def _write(folder: Path, shape: str, adapters: int) -> None:
    """Write a base and adapters, random ones."""
    config = config_of(shape)
    write_config(folder / "source", config)
    save_base(
        family_of(config).model(config, rngs=nnx.Rngs(0)),
        folder / "base",
        folder / "source",
    )
    write_adapters(folder, config, adapters)


def _measured(folder: Path, modules: int, what: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--point", str(folder), str(modules), what]
    done = subprocess.run(
        command,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _point(name: str, modules: str, what: str) -> dict[str, Any]:
    """Return the peak of loading so many modules, or of a few steps with them, in bytes."""
    folder = Path(name)
    count = int(modules)
    jax.devices()
    before = memory("VmRSS")
    if what == "convert":
        sources = tuple(map(str, sorted(folder.glob("adapter_*"))))
        convert(
            ConvertOptions(
                base=str(folder / "base"), out=folder / "pool", adapters=sources
            )
        )
        written = sum(
            file.stat().st_size
            for file in (folder / "pool").rglob("*")
            if file.is_file()
        )
        return {"peak": memory("VmHWM") - before, "bytes": written}
    if what == "make basis":
        began = time.perf_counter()
        add_basis(folder / "pool", count)
        return {
            "seconds": time.perf_counter() - began,
            "peak": memory("VmHWM") - before,
        }
    if what == "load basis":
        basis = load_basis(folder / "pool")
        return {
            "peak": memory("VmHWM") - before,
            "basis": sum(a.nbytes for a in jax.tree.leaves(basis)),
        }
    if what == "load":
        pool = load_pool(folder / "pool", chosen=range(count))
        return {
            "peak": memory("VmHWM") - before,
            "pool": sum(a.nbytes for a in jax.tree.leaves((pool.A, pool.B))),
        }
    model = load_base(folder / "base", quantise=None if what == "full" else what)
    pool = load_pool(folder / "pool", chosen=range(count))
    pool = pool if what == "full" else pool.quantised(what)
    used = {site: kernel for site, kernel in kernels(model).items() if site in pool.A}
    graph, base = nnx.split(model)
    frozen = Frozen(base, pool, jax.jit(gram)(pool, used))
    batches = jax.tree.map(
        lambda a: a[:, None], batch_of(model.config, (BATCH, SOURCE, TARGET))
    )  # of one step
    del model, pool, used
    method = Fusion(composition="mix")
    problem = Problem(
        graph=graph,
        method=method,
        frozen=frozen,
        index=jnp.arange(count)[None],
        seed_mode="sequential",
    )
    problem = problem.unstacked()
    recipe = dataclasses.replace(PRESETS["default"], schedule="constant")
    state = start(problem, (0,))
    rates = recipe_rates(method, recipe, 1)
    losses = []
    for _ in range(_STEPS):
        state, metrics = train_seeds(
            state, batches, problem, rates, optimisation=recipe.optimisation(_STEPS)
        )
        losses.append(float(metrics["loss"][0, 0]))
    assert np.isfinite(losses).all()
    return {"peak": memory("VmHWM") - before, "modules": count}


if __name__ == "__main__":
    main()
