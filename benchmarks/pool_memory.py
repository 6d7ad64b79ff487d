"""Memory of fusing from a pool that is larger than what is at hand: what is not chosen is not read.

    python benchmarks/pool_memory.py [--shape flan-t5-large] [--adapters 196] [--modules 20] [--json]

A random base and a converted pool of random adapters of rank 16 on q and v (20 different ones, over and over) are
written to a temporary folder. Processes of their own load all of the pool, take steps with a few modules of it, and
steps with all of them in 4 bits, as `--load-in nf4` does; their peaks are the system's (VmHWM) above their imports.
Batches of 5 rows of 128 source and 8 target tokens. FLAN-T5-large's shape takes 12 GiB of disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lorafusion_jax.params import SHAPES

_RANK, _DIFFERENT = 16, 20
_GIB = 2**30
_BAR = 8 * _GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="flan-t5-large", help="of the base model")
    parser.add_argument("--adapters", type=int, default=196, help="in the pool")
    parser.add_argument("--modules", type=int, default=20, help="that one fusion mixes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point is not None:
        print(json.dumps(_point(*options.point)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, options.shape, options.adapters)
        loaded = _measured(folder, options.adapters, "load")
        few = _measured(folder, options.modules, "full")
        every = _measured(folder, options.adapters, "nf4")
    size = f"{options.adapters} adapters of {options.shape}'s shape"
    cases = [
        _case(f"{size} loaded: peak / bytes of the pool", loaded, loaded["pool_bytes"], 1.25, 1.05),
        _case(f"{options.modules} of {size} fused: peak / 8 GiB", few, _BAR, 1.0, 0.75),
        _case(f"{size} fused, all in 4 bits: peak / 8 GiB", every, _BAR, 1.0, 0.75),
    ]
    if options.json:
        print(json.dumps({"shape": options.shape, "cases": cases}, indent=1))
        return
    for case in cases:
        print(f"{case['name']}: {case['ratio']:.3g} (required: at most {case['required']}), {case['computed_from']}")


def _case(name: str, found: dict[str, Any], of: int, required: float, ambition: float) -> dict[str, Any]:
    return {
        "name": name,
        "ratio": found["peak_bytes"] / of,
        "required": required,
        "ambition": ambition,
        "higher_is_better": False,
        "computed_from": found,
    }


def _write(folder: Path, shape: str, adapters: int) -> None:
    """Write a base and a pool, random ones."""
    import numpy as np
    from flax import nnx

    from lorafusion_jax.io.convert import ConvertOptions, convert
    from lorafusion_jax.io.hf import save_base
    from lorafusion_jax.io.peft import write_adapter
    from lorafusion_jax.models.sites import linear_shapes
    from lorafusion_jax.models.t5 import T5

    config = SHAPES[shape]
    fields = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")
    text = {field: getattr(config, field) for field in fields}
    text |= {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": config.tied}
    (folder / "source").mkdir()
    (folder / "source/config.json").write_text(json.dumps(text))
    save_base(T5(config, rngs=nnx.Rngs(0)), folder / "base", folder / "source")
    rng, sources = np.random.default_rng(0), []
    for n in range(adapters):
        source = folder / f"adapter_{n:03d}"
        if n >= _DIFFERENT:
            source.mkdir()
            for file in sources[n % _DIFFERENT].iterdir():
                os.link(file, source / file.name)
        else:
            tensors = {}
            for path, (d_in, d_out) in linear_shapes(config).items():
                if path.endswith((".q", ".v")):
                    key = f"base_model.model.{path}.lora_"
                    tensors[f"{key}A.weight"] = 0.02 * rng.standard_normal((_RANK, d_in), np.float32)
                    tensors[f"{key}B.weight"] = 0.02 * rng.standard_normal((d_out, _RANK), np.float32)
            said = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 32, "target_modules": ["q", "v"]}
            write_adapter(source, said | {"task_type": "SEQ_2_SEQ_LM", "inference_mode": True}, tensors)
        sources.append(source)
    convert(ConvertOptions(base=str(folder / "base"), out=folder / "pool", adapters=tuple(map(str, sources))))


def _measured(folder: Path, modules: int, what: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--point", str(folder), str(modules), what]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _point(name: str, modules: str, what: str) -> dict[str, Any]:
    """Return the peak of loading so many modules, and of a few steps with them."""
    import dataclasses
    import time
    from functools import partial

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from lorafusion_jax.fusion.compose import gram
    from lorafusion_jax.io.hf import load_base
    from lorafusion_jax.io.pool import load_pool
    from lorafusion_jax.models.t5 import kernels
    from lorafusion_jax.tasks import Batch
    from lorafusion_jax.train.fit import recipe_rates, train_seeds
    from lorafusion_jax.train.methods import Frozen, Fusion
    from lorafusion_jax.train.options import PRESETS
    from lorafusion_jax.train.step import init_state

    folder, count = Path(name), int(modules)
    jax.devices()
    before, began = _memory("VmRSS"), time.perf_counter()
    if what == "load":
        pool = load_pool(folder / "pool", chosen=range(count))
        peak, held = _memory("VmHWM") - before, sum(a.nbytes for a in jax.tree.leaves((pool.A, pool.B)))
        return {"peak_bytes": peak, "pool_bytes": held, "seconds": time.perf_counter() - began}
    model = load_base(folder / "base", quantise=None if what == "full" else what)
    pool = load_pool(folder / "pool", chosen=range(count))
    pool = pool if what == "full" else pool.quantised(what)
    used = {site: kernel for site, kernel in kernels(model).items() if site in pool.A}
    graph, base = nnx.split(model)
    frozen = Frozen(base, pool, jax.jit(gram)(pool, used))
    del model, pool, used
    method = Fusion(composition="mix")
    keys, index = jax.random.split(jax.random.key(0), 1), jnp.arange(count)[None]
    state = jax.jit(lambda index, keys, frozen: jax.vmap(partial(init_state, method, frozen))(index, keys))(
        index, keys, frozen
    )
    rng = np.random.default_rng(0)
    source, target = (rng.integers(2, 32000, (1, 5, width), np.int32) for width in (128, 8))
    batch = Batch(source, np.ones(source.shape, bool), target, np.ones((1, 5), bool))
    recipe = dataclasses.replace(PRESETS["default"], schedule="constant")
    static = {"graph": graph, "method": method, "optimisation": recipe.optimisation(3), "path": "map"}
    losses = []
    for _ in range(3):
        state, metrics = train_seeds(state, batch, index, frozen, recipe_rates(recipe, 1), **static)
        losses.append(float(metrics["loss"][0]))
    assert np.isfinite(losses).all()
    return {"peak_bytes": _memory("VmHWM") - before, "seconds": time.perf_counter() - began, "modules": count}


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
