"""Compile the package's programs for a TPU or H100 that is not there: memory, precision and exchanges.

    python benchmarks/accelerators.py [--chip v5e] [--shape small-pool] [--seeds 8] [--json]

The fusion step as `mix` (also ten in one call, as runs take an epoch's, with weights in NF4, and with packed rows), as
`sum` and as `sum` in a shared basis of 32 directions, and generation (10 rows, 32 tokens) with the sum. Batched seeds,
bfloat16, layers in a loop. By name also a step on one long row, and reads of arrays (`--program "read with noise"`).
Needs the `aot-tpu` extra (libtpu's own compiler), or `aot-cuda` for an H100.
"""

import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _measure import case
from _model import (
    BATCH,
    RANK,
    SOURCE,
    Composition,
    Dtype,
    arguments,
    config_of,
    held_in,
    precomputed,
    shape_parser,
    shapes_of,
    step_of,
)
from jax import Array
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    SingleDeviceSharding,
    use_abstract_mesh,
)

from lorafusion_jax import (
    Architecture,
    Frozen,
    Fusion,
    FusionRecipe,
    LoraPool,
    Problem,
    SharedBasis,
    crossbar,
)
from lorafusion_jax.crossbar.read import definition
from lorafusion_jax.estimates import (
    Settings,
    Shape,
    held_bytes,
    program_of,
)
from lorafusion_jax.models import advance, begin
from lorafusion_jax.tasks import Batch
from lorafusion_jax.training import AXES, AXIS, Params, shardings

_GIB = 2**30
_K = 32
_NEW = 32  # tokens that are generated
# of a read
_SIZE = 1024
_INPUTS = 256
_MEMORY = 1.25  # the compiler's over the plan's

_PRODUCT = re.compile(
    r"stablehlo\.dot_general (.*?) : \((tensor<[\dx]*f32>, tensor<[\dx]*f32>)\)"
)
_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*"
)


class _Program(NamedTuple):
    composition: Composition
    basis: int | None = None  # directions
    generates: bool = False
    weights: Dtype = "bfloat16"
    mesh: tuple[int, int] | None = None  # devices that share seeds, and matrices
    steps: int = 1  # in one call
    rows: int = BATCH
    source: int = SOURCE  # tokens of a row
    groups: tuple[tuple[int, int, int], ...] = ()  # of the rows of a packed batch


_PROGRAMS = {
    "mix": _Program("mix"),
    "mix, 10 steps in one call": _Program("mix", steps=10),
    "mix, base and pool in NF4": _Program("mix", weights="nf4"),
    "mix, packed rows": _Program(
        "mix", rows=1, source=640, groups=((2, 192, 8), (2, 112, 8), (1, 32, 8))
    ),
    "mix on a mesh of 4 x 2": _Program("mix", mesh=(4, 2)),
    "mix on a row of 4,096 tokens": _Program("mix", rows=1, source=4096),
    "sum": _Program("sum"),
    f"sum in a basis of {_K}": _Program("sum", basis=_K),
    "generation with the sum": _Program("sum", generates=True, rows=10),
}


# Devices of arrays, and paths: 256 inputs read a matrix of 1024 x 1024, as `benchmarks/crossbar.py` describes it.
_IMPERFECT = crossbar.Device(programming=crossbar.Independent(0.04))
_READS = {
    "read of arrays": (crossbar.Device(), None),
    "read of arrays, by the definition": (crossbar.Device(), "definition"),
    "read of imperfect arrays": (_IMPERFECT, None),
    "read of imperfect arrays, by the definition": (_IMPERFECT, "definition"),
    "read of imperfect arrays, by the loop": (_IMPERFECT, "loop"),
    "read with noise": (crossbar.Device(read_noise=crossbar.ReadNoise(0.04)), None),
    "read with noise, cell by cell": (
        crossbar.Device(read_noise=crossbar.ReadNoise(0.04, clip=True)),
        None,
    ),
}


class _Chip(NamedTuple):
    topology: str
    accelerator: str
    platform: str = "tpu"


_CHIPS = {
    "v5e": _Chip("v5e:2x4", "v5litepod-8"),
    "v6e": _Chip("v6e:2x4", "v6e-8"),
    "h100": _Chip("1x1x8", "NVIDIA H100 80GB HBM3", "cuda"),
}
# XLA's description of an H100; without a card there is no choice of kernels by measurement.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  runtime_version: "12.9.0"
  driver_version: "12.9.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main() -> None:
    parser = shape_parser(__doc__, "small-pool")
    parser.add_argument("--chip", choices=_CHIPS, default="v5e")
    parser.add_argument(
        "--program",
        choices=[*_PROGRAMS, *_READS],
        nargs="+",
        help="by default all but long rows and reads",
    )
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    chip = _CHIPS[options.chip]
    is_tpu = chip.platform == "tpu"
    compiler = "libtpu" if is_tpu else "jax_cuda12_plugin"
    if importlib.util.find_spec(compiler) is None:
        extra = "aot-tpu" if is_tpu else "aot-cuda"
        sys.exit(
            f"{compiler}, which compiles for {options.chip}, is not installed: pip install -e '.[{extra}]'"
        )
    # A mesh is compiled for TPUs alone.
    default = [
        name
        for name, program in _PROGRAMS.items()
        if program.source < 4096 and (is_tpu or not program.mesh)
    ]
    config = config_of(options.shape, "bfloat16")
    cases = []
    for name in options.program or default:
        if name in _READS:
            where = f"{options.chip}, compiled, not run: {name}:"
            cases.append(_read(where, name, chip))
        else:
            where = f"{options.chip}, compiled, not run: {options.shape}, {name}, {options.seeds} seeds:"
            cases += _step(where, name, config, options.seeds, chip)
    _measure.show(cases, as_json=options.json)


def _step(
    where: str, name: str, config: Architecture, seeds: int, chip: _Chip
) -> list[dict[str, Any]]:
    """Compile one program for some seeds, and return its cases."""
    program = _PROGRAMS[name]
    devices = _devices(chip)
    if program.mesh is None:
        with _traced_for(devices[0]):
            lowered, planned = _lowered(
                program, config, seeds, partial(_on, SingleDeviceSharding(devices[0]))
            )
        compiled = lowered.compile()
        return [
            _precision(where, lowered),
            _memory(where, compiled, planned),
            case(f"{where} collectives", len(_exchanges(compiled)), 0),
        ]
    mesh = Mesh(
        np.reshape(devices[: math.prod(program.mesh)], program.mesh),
        AXES,
        axis_types=(AxisType.Auto, AxisType.Auto),
    )
    with jax.set_mesh(mesh):
        lowered, _ = _lowered(program, config, seeds, _on_mesh)
        exchanges = _exchanges(lowered.compile())
    matrices = program.mesh[1]
    kinds = sorted({kind for kind, _ in exchanges})
    across = [
        group
        for _, group in exchanges
        if len({device // matrices for device in group}) > 1
    ]
    return [
        _precision(where, lowered),
        case(
            f"{where} kinds of collectives but sums",
            len({*kinds} - {"all-reduce"}),
            0,
            kinds=kinds,
        ),
        case(f"{where} groups of devices in which seeds meet", len(across), 0),
    ]


def _traced_for(device: Any) -> Any:
    platform = "cuda" if device.platform == "gpu" else device.platform
    return use_abstract_mesh(
        AbstractMesh(
            (), (), abstract_device=AbstractDevice(device.device_kind, 1, platform)
        )
    )


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

    if chip.platform == "cuda":
        return topologies.get_topology_desc(
            platform="cuda", topology=chip.topology, target_config=_H100
        ).devices
    return topologies.get_topology_desc(
        platform="tpu", topology_name=chip.topology
    ).devices


def _lowered(
    program: _Program, config: Architecture, seeds: int, on: Callable[..., Any]
) -> tuple[Any, float]:
    """Return a program to be compiled, and the bytes that the package plans for it on one device.

    `on(shapes, config, of_seeds=)` places shapes of arrays as `training.mesh.on_mesh` places arrays.
    """
    composition, k, generates, dtype, _, steps, rows, source, groups = program
    weights = shapes_of(config, dtype)
    method = Fusion(composition=composition, basis=k)
    recipe = FusionRecipe(composition=composition, basis=k)
    how: Any = {
        "seed_mode": "batched",
        "device": "accelerator",
        "load_in": held_in(dtype),
    }
    settings = Settings(recipe=recipe, rank=RANK, seeds=seeds, **how)
    weights = weights if k is None else _in_basis(weights, k)
    weights = jax.eval_shape(partial(precomputed, config, method), weights)
    shaped: Any = {"seeds": seeds, "seed_mode": "batched", "groups": groups}
    state, batch, problem, rates = arguments(
        config, weights, method, (rows, source), **shaped
    )
    state = on(state, config, of_seeds=True)
    batch = on(batch, of_seeds=True)
    rates = on(rates, of_seeds=True)
    problem = problem.replace(
        frozen=on(problem.frozen, config), index=on(problem.index, of_seeds=True)
    )
    if generates:
        one = on(
            jax.eval_shape(lambda batch: jax.tree.map(lambda a: a[0], batch), batch)
        )
        ended = jax.ShapeDtypeStruct((), jnp.int32, sharding=one.row_mask.sharding)
        lowered: Any = jax.jit(_generate).lower(state.params, one, problem, ended)
    else:
        lowered = step_of((state, batch, problem, rates), steps)
    target = _NEW if generates else batch.labels.shape[-1]
    planned = program_of(
        config,
        "fusion",
        settings,
        "answers" if generates else "step",
        Shape(rows, source, target, groups),
    )
    return lowered, held_bytes(config, "fusion", settings) + planned.bytes


def _generate(params: Params, batch: Batch, problem: Problem, ended: Array) -> Array:
    """Return the ids of all seeds: what `runs.generation` computes for one batch in several calls, as one program.

    It ends once `ended` rows of each seed have ended. Their number is an argument, so that the loop's one constant is
    its steps.
    """

    def of_seed(one: Problem, params: Params, batch: Batch) -> Array:
        model, adapters, _ = one.adapted_model(params)
        how: Any = {"max_new_tokens": _NEW, "row_mask": batch.row_mask}
        state = begin(model, batch.input_ids, batch.input_mask, adapters, **how)
        limits: Any = {"ended": ended, "most_steps": jnp.int32(_NEW)}
        return advance(model, state, adapters, **limits, axis=AXIS).tokens

    problem = problem.per_layer()
    return problem.over_seeds(of_seed, (params,), (batch,))


def _on(
    sharding: Any,
    shapes: Any,
    config: Architecture | None = None,
    *,
    of_seeds: bool = False,
) -> Any:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes
    )


def _on_mesh(
    shapes: Any, config: Architecture | None = None, *, of_seeds: bool = False
) -> Any:
    leaves, structure = jax.tree.flatten(shapes)
    where = zip(leaves, shardings(shapes, config, of_seeds=of_seeds), strict=True)
    return structure.unflatten(
        [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=of_leaf)
            for a, of_leaf in where
        ]
    )


def _in_basis(weights: Frozen, k: int) -> Frozen:
    """Return the shapes of the weights with their pool in a shared basis, which itself is made on the host."""
    pool = weights.pool
    assert isinstance(pool, LoraPool)

    def made(of: Callable[..., tuple[int, ...]]) -> dict[str, Any]:
        sides = {
            n: (*A.shape[:3], pool.B[n].shape[3]) for n, A in pool.A.items()
        }  # layers, modules, d_in, d_out
        return {
            site: jax.ShapeDtypeStruct(of(*sizes), jnp.float32)
            for site, sizes in sides.items()
        }

    basis = SharedBasis(
        U=made(lambda L, P, d_in, d_out: (L, d_in, k)),
        V=made(lambda L, P, d_in, d_out: (L, k, d_out)),
        S=made(lambda L, P, d_in, d_out: (L, P, k, k)),
        energy=made(lambda L, P, d_in, d_out: (L, P)),
        rank=pool.rank,
        names=pool.names,
        sites=pool.sites,
    )
    return Frozen(weights.base, basis)


def _precision(where: str, lowered: Any) -> dict[str, Any]:
    """Count float32 products that do not ask for the highest precision.

    A compiled program does not show them: where a product may round its factors, they arrive rounded.
    """
    products = _PRODUCT.findall(lowered.as_text())
    below = [
        shapes
        for attributes, shapes in products
        if "precision = [HIGHEST, HIGHEST]" not in attributes
    ]
    return case(f"{where} float32 products below highest", len(below), 0, shapes=below)


def _memory(where: str, compiled: Any, planned: float) -> dict[str, Any]:
    memory = compiled.memory_analysis()
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    allocated = memory.argument_size_in_bytes + memory.temp_size_in_bytes + returned
    return case(
        f"{where} the compiler's memory / the plan's",
        allocated / planned,
        _MEMORY,
        arguments_gib=memory.argument_size_in_bytes / _GIB,
        temporaries_gib=memory.temp_size_in_bytes / _GIB,
        planned_gib=planned / _GIB,
    )


def _exchanges(compiled: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Return kind and devices of every group of every exchange between devices."""
    exchanges = []
    for found in _COLLECTIVE.finditer(compiled.as_text()):
        for group in _groups(found.group()):
            exchanges.append((found.group(1), group))
    return exchanges


def _groups(text: str) -> list[tuple[int, ...]]:
    """Return the groups of devices of an exchange, for which `{{0,1},{2,3}}` and `[2,2]<=[4]` are two notations."""
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        groups = re.findall(r"\{([\d,]+)\}", listed.group(1))
        return [tuple(map(int, group.split(","))) for group in groups]
    counted = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    )
    if counted is None:
        raise ValueError(f"an exchange without groups of devices: {text[:200]}")
    shape, sizes, axes = map(_integers, counted.groups())
    assert shape is not None and sizes is not None, text
    devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(axes)
    return [tuple(row) for row in devices.reshape(shape).tolist()]


def _integers(text: str | None) -> tuple[int, ...] | None:
    return tuple(map(int, text.split(","))) if text else None


def _read(where: str, name: str, chip: _Chip) -> dict[str, Any]:
    """Compile one read of arrays, and return its case."""
    dac = crossbar.DAC(signed=False, scaling="fixed", limit=1.0)
    adc = crossbar.ADC(bits=8, range="calibrated")
    cells, path = _READS[name]
    device = _devices(chip)[0]
    slices = crossbar.Cell(bits=(2, 2, 2, 2))
    config = crossbar.CrossbarConfig(cell=slices, dac=dac, adc=adc, device=cells)
    with _traced_for(device):
        w = jax.ShapeDtypeStruct((_SIZE, _SIZE), jnp.float32)
        x = jax.ShapeDtypeStruct((_INPUTS, _SIZE), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        arrays = jax.eval_shape(
            lambda w, key: crossbar.program(w, config, key, path=path), w, key
        )
        # The ranges that calibration will find.
        limits = jax.ShapeDtypeStruct((1, len(config.weight_slices), 2), w.dtype)
        arrays = dataclasses.replace(arrays, limits=limits)
        read = jax.jit(
            lambda x, arrays, key: crossbar.matmul(
                x, crossbar.with_read_key(arrays, key)
            )
        )
        placed = _on(SingleDeviceSharding(device), (x, arrays, key))
        compiled: Any = read.lower(*placed).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return case(
        f"{where} temporaries / 256 MiB",
        temporaries / definition.BUDGET,
        1,
        path=arrays.plan.path,
        temporaries_mib=temporaries / 2**20,
    )


if __name__ == "__main__":
    main()
