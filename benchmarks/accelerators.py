"""Compile the package's programs for a TPU without one: memory, FLOPs, bytes, cycles and precision; nothing is run.

    python benchmarks/accelerators.py [--chip v5e] [--shape small-pool] [--seeds 8] [--json]

The fusion step as `mix` (also of weights in NF4, whose memory is below the plan's for bfloat16), as `sum` and as `sum`
in a shared basis of 32 directions, and generation (10 rows, 32 tokens) with the sum. Batched seeds, bfloat16, layers in
a loop. libtpu's own compiler; counts are taken from its optimised HLO with the trips of every loop (`_hlo.py`). The
roofline time is the larger of FLOPs and of bytes over a chip's published peaks (https://cloud.google.com/tpu/docs/v6e),
a bound from below and not a measurement. Needs the `aot-tpu` extra.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import _measure
import jax
import jax.numpy as jnp
from _hlo import Counts, counts
from _measure import case
from _model import BATCH, CHOICES, RANK, SOURCE, TARGET, Dtype, arguments, config_of, graph_of, shapes_of, step_of
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from lorafusion_jax import Recipe
from lorafusion_jax.adapters.basis import SharedBasis
from lorafusion_jax.adapters.pool import LoraPool
from lorafusion_jax.estimates.estimate import Settings, trained_numbers, update_of
from lorafusion_jax.estimates.flops import Shape, generation_flops, keys, step_flops
from lorafusion_jax.estimates.memory import evaluation_bytes, pool_bytes, state_bytes, step_bytes, weights_bytes
from lorafusion_jax.methods.fusion import Fusion
from lorafusion_jax.models.architecture import Architecture, kernels
from lorafusion_jax.runs.evaluate import generate_seeds
from lorafusion_jax.training.problem import Frozen

_GIB, _K = 2**30, 32
_ROWS, _NEW = 10, 32  # of generation
_MEMORY, _FLOPS = 1.25, 1.02  # the larger of ours and the compiler's over the smaller
# Method, directions of a shared basis, whether it generates, and how weights are held.
_PROGRAMS: dict[str, tuple[str, int | None, bool, Dtype]] = {
    "mix": ("fusion-mix", None, False, "bfloat16"),
    "mix, base and pool in NF4": ("fusion-mix", None, False, "nf4"),
    "sum": ("fusion-sum", None, False, "bfloat16"),
    f"sum in a basis of {_K}": ("fusion-sum", _K, False, "bfloat16"),
    "generation with the sum": ("fusion-sum", None, True, "bfloat16"),
}


class _Chip(NamedTuple):
    topology: str
    accelerator: str
    flops: float  # of bfloat16, a second
    bandwidth: float  # bytes a second


_CHIPS = {
    "v5e": _Chip("v5e:2x4", "v5litepod-8", 197e12, 819e9),
    "v6e": _Chip("v6e:2x4", "v6e-8", 918e12, 1640e9),
}


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--chip", choices=_CHIPS, default="v5e")
    parser.add_argument("--shape", choices=CHOICES, default="small-pool", help="of the base model")
    parser.add_argument("--program", choices=_PROGRAMS, nargs="+", default=list(_PROGRAMS))
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("libtpu is not installed, and nothing else compiles for a TPU: pip install -e '.[aot-tpu]'")
    chip = _CHIPS[options.chip]
    device = _devices(chip)[0]
    cases = []
    for name in options.program:
        program, planned, flops = _program(name, options.shape, options.seeds, device)
        where = f"{options.chip}, compiled, not run: {options.shape}, {name}, {options.seeds} seeds:"
        cases += _cases(where, program.compile(), planned, flops, chip)
    _measure.show(cases, as_json=options.json)


def _devices(chip: _Chip) -> Any:
    """Return the chips of a topology that is described and not there."""
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": chip.accelerator,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices


def _program(name: str, shape: str, seeds: int, device: Any) -> tuple[Any, float, float]:
    """Return a program to be compiled, and what the package plans for it: bytes and FLOPs."""
    of, k, generates, dtype = _PROGRAMS[name]
    config = config_of(shape, "bfloat16")
    weights = shapes_of(config, dtype)
    method = Fusion(composition="mix" if of.endswith("mix") else "sum", basis=k)
    settings = Settings(recipe=Recipe(basis=k), rank=RANK, path="vmap", seeds=seeds, device="accelerator")
    update, trainable = update_of(of, settings), trained_numbers(config, of, settings)
    rows = _ROWS if generates else BATCH
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(device.device_kind, 1, "tpu"))):
        given = arguments(
            config, weights if k is None else _in_basis(config, weights, k), method, rows, seeds=seeds, path="vmap"
        )
        state, batch, problem, rates = _on(device, given)
        if generates:
            one = _on(device, jax.eval_shape(lambda batch: jax.tree.map(lambda a: a[0], batch), batch))
            whole = jax.jit(generate_seeds, static_argnames="max_new_tokens")
            program: Any = whole.lower(state.params, one, problem, max_new_tokens=_NEW)
        else:
            program = step_of((state, batch, problem, rates))
    how: Any = {"update": update, "seeds": seeds, "path": settings.path, "device": settings.device}
    if generates:
        work = evaluation_bytes(config, Shape(rows, SOURCE, 0), _NEW, **how)
        flops = generation_flops(config, Shape(rows, SOURCE, _NEW), update) - _of_one_query(config, rows)
        held = 4 * trainable
    else:
        work = step_bytes(config, Shape(rows, SOURCE, TARGET), trainable=trainable, **how)
        flops = step_flops(config, Shape(rows, SOURCE, TARGET), update, trainable=trainable)
        held = state_bytes(trainable)
    return program, weights_bytes(config) + pool_bytes(config, update) + seeds * held + work, seeds * flops


def _of_one_query(config: Architecture, rows: int) -> float:
    """Return the FLOPs of attention from single tokens, where libtpu has no product: it multiplies and sums vectors."""
    shape = Shape(rows, SOURCE, _NEW)
    return 4.0 * sum(
        stack.layers * rows * _NEW * keys(attention, shape) * attention.heads * attention.d_head
        for stack in config.stacks.values()
        for attention in stack.attentions
        if "target" in stack.reads and attention.heads == attention.kv_heads
    )


def _on(device: Any, shapes: Any) -> Any:
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)


def _in_basis(config: Architecture, weights: Frozen, k: int) -> Frozen:
    """Return the shapes of the weights with their pool in a shared basis, which itself is made on the host."""
    pool = weights.pool
    assert isinstance(pool, LoraPool)

    def made(of: Callable[..., tuple[int, ...]]) -> dict[str, Any]:
        sides = {n: (*A.shape[:3], pool.B[n].shape[3]) for n, A in pool.A.items()}  # layers, modules, d_in, d_out
        return {site: jax.ShapeDtypeStruct(of(*sizes), jnp.float32) for site, sizes in sides.items()}

    basis = SharedBasis(
        U=made(lambda L, P, d_in, d_out: (L, d_in, k)),
        V=made(lambda L, P, d_in, d_out: (L, k, d_out)),
        S=made(lambda L, P, d_in, d_out: (L, P, k, k)),
        energy=made(lambda L, P, d_in, d_out: (L, P)),
        rank=pool.rank,
        names=pool.names,
        sites=pool.sites,
    )

    def prepared(weights: Frozen) -> Frozen:
        return Fusion(composition="sum", basis=k).prepare(weights, kernels(nnx.merge(graph_of(config), weights.base)))

    return jax.eval_shape(prepared, Frozen(weights.base, basis))


def _cases(where: str, compiled: Any, planned: float, flops: float, chip: _Chip) -> list[dict[str, Any]]:
    memory, found = compiled.memory_analysis(), counts(compiled.as_text())
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    allocated = memory.argument_size_in_bytes + memory.temp_size_in_bytes + returned
    return [
        case(
            f"{where} the compiler's memory / the plan's",
            allocated / planned,
            _MEMORY,
            arguments_gib=memory.argument_size_in_bytes / _GIB,
            temporaries_gib=memory.temp_size_in_bytes / _GIB,
            planned_gib=planned / _GIB,
        ),
        case(
            f"{where} FLOPs of the program and the plan's, the larger over the smaller",
            max(found.flops / flops, flops / found.flops),
            _FLOPS,
            tflop=found.flops / 1e12,
            planned_tflop=flops / 1e12,
        ),
        case(f"{where} float32 products below highest", found.below.total(), 0, places=dict(found.below)),
        case(f"{where} collectives", found.collectives.total(), 0, kinds=dict(found.collectives)),
        _time(where, found, chip),
    ]


def _time(where: str, found: Counts, chip: _Chip) -> dict[str, Any]:
    computing, moving = found.flops / chip.flops, found.bytes / chip.bandwidth
    return case(
        f"{where} roofline, time of the bytes / time of the FLOPs",
        moving / computing,
        None,
        roofline_ms=1e3 * max(computing, moving),
        gb=found.bytes / 1e9,
        megacycles=found.cycles / 1e6,
    )


if __name__ == "__main__":
    main()
