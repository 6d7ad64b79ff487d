"""Memory of a training step: what `--plan` foretells against what XLA allocates. Nothing is loaded or computed.

    python benchmarks/memory.py [--shape flan-t5-large] [--json]

The real step of one seed is compiled from shapes alone, for a source of 128 tokens and a target of 8, in float32 and
bfloat16, for batches of 5 and 10. A pool of 20 modules of rank 16 on q and v.
"""

import argparse
import dataclasses
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lorafusion_jax.fusion.compose import gram
from lorafusion_jax.fusion.pool import LoraPool
from lorafusion_jax.models.sites import targeted
from lorafusion_jax.models.t5 import T5, T5Config, kernels
from lorafusion_jax.params import SHAPES
from lorafusion_jax.tasks import Batch
from lorafusion_jax.train.baselines.full import FullFineTuning
from lorafusion_jax.train.baselines.lora import LoRA
from lorafusion_jax.train.cost import Shape
from lorafusion_jax.train.estimate import Settings, trainable_count, update_of
from lorafusion_jax.train.fit import recipe_rates, train_seeds
from lorafusion_jax.train.memory import pool_bytes, state_bytes, step_bytes, weights_bytes
from lorafusion_jax.train.methods import Frozen, Fusion, Method
from lorafusion_jax.train.step import init_state

_SETTINGS = Settings()
_MODULES, _RANK, _TARGETS = _SETTINGS.recipe.modules, _SETTINGS.rank, _SETTINGS.targets
_METHODS = {
    "fusion-sum": "LoRAFusion",
    "fusion-mix": "LoRAFusion, mix",
    "lora": "LoRA",
    "full": "full fine-tuning",
}
_GIB = 2**30
_REQUIRED = 1.25  # the plan's tests allow a quarter, on small models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="flan-t5-large", help="of the base model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    cases = [
        _case(name, dataclasses.replace(SHAPES[options.shape], dtype=dtype), rows)
        for name in _METHODS
        for dtype in ("float32", "bfloat16")
        for rows in (5, 10)
    ]
    if options.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "shape": options.shape, "cases": cases}, indent=1))
        return
    print(f"{options.shape}, GiB, planned / XLA's on {jax.devices()[0].device_kind}")
    for case in cases:
        print(f"{case['name']}: {case['planned'] / _GIB:.2f} / {case['allocated'] / _GIB:.2f}")


def _case(name: str, config: T5Config, rows: int) -> dict[str, Any]:
    planned, allocated = _planned(name, config, rows), _allocated(name, config, rows)
    return {
        "name": f"{_METHODS[name]}, {config.dtype}, batch {rows}",
        "ratio": max(planned / allocated, allocated / planned),
        "required": _REQUIRED,
        "ambition": 1.05,
        "higher_is_better": False,
        "planned": planned,
        "allocated": allocated,
    }


def _planned(name: str, config: T5Config, rows: int) -> int:
    update, trainable = update_of(name, _SETTINGS), trainable_count(config, name, _SETTINGS)
    needed = step_bytes(config, Shape(rows, 128, 8), update, trainable=trainable, seeds=1, path="map", device="cpu")
    # Nothing reads the base where all of it is trained, and XLA does not count it.
    base = 0 if name == "full" else weights_bytes(config)
    return base + pool_bytes(config, update) + state_bytes(trainable) + needed


def _allocated(name: str, config: T5Config, rows: int) -> int:
    """Return the bytes of arguments, temporaries and results of the compiled step."""
    graph, frozen = _frozen(name, config)
    method = _method(name, config)
    index = jax.ShapeDtypeStruct((1, _MODULES), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    state = jax.eval_shape(jax.vmap(partial(init_state, method), in_axes=(None, 0, 0)), frozen, index, keys)
    source, target = (jax.ShapeDtypeStruct((1, rows, width), jnp.int32) for width in (128, 8))
    batch = Batch(source, jax.ShapeDtypeStruct(source.shape, bool), target, jax.ShapeDtypeStruct((1, rows), bool))
    rates = jax.eval_shape(lambda: recipe_rates(_SETTINGS.recipe, 1))
    optimisation = _SETTINGS.recipe.optimisation(steps=10)
    static = {"graph": graph, "method": method, "optimisation": optimisation, "path": "map"}
    found = train_seeds.lower(state, batch, index, frozen, rates, **static).compile().memory_analysis()
    assert found is not None
    returned = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + returned


def _method(name: str, config: T5Config) -> Method:
    if name == "full":
        return FullFineTuning()
    if name == "lora":
        return LoRA(sites=tuple(targeted(config, _TARGETS).items()), rank=_RANK)
    return Fusion(composition="mix" if name.endswith("mix") else "sum")


def _frozen(name: str, config: T5Config) -> tuple[nnx.GraphDef, Frozen]:
    """Return the model's structure and the shapes of what is frozen."""
    model = nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0)))
    graph, base = nnx.split(model)
    base = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(config.dtype)), base)
    if not name.startswith("fusion"):
        return graph, Frozen(base)
    adapted = targeted(config, _TARGETS)

    def pool() -> LoraPool:
        return LoraPool(
            A={n: jnp.zeros((s.layers, _MODULES, s.d_in, _RANK)) for n, s in adapted.items()},
            B={n: jnp.zeros((s.layers, _MODULES, _RANK, s.d_out)) for n, s in adapted.items()},
            rank={n: jnp.full((s.layers, _MODULES), _RANK) for n, s in adapted.items()},
            names=tuple(map(str, range(_MODULES))),
        )

    modules = jax.eval_shape(pool)
    used = {site: kernel for site, kernel in kernels(nnx.merge(graph, base)).items() if site in adapted}
    return graph, Frozen(base, modules, jax.eval_shape(gram, modules, used))


if __name__ == "__main__":
    main()
