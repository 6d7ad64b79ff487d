"""Compile the package's programs for a TPU or H100 that is not there: memory, FLOPs, bytes, cycles and precision.

    python benchmarks/accelerators.py [--chip v5e] [--shape small-pool] [--seeds 8] [--json]

The fusion step as `mix` (also ten in one call, as runs take an epoch's, with weights in NF4, and with packed rows), as
`sum` and as `sum` in a shared basis of 32 directions, and generation (10 rows, 32 tokens) with the sum. Batched seeds,
bfloat16, layers in a loop. Times and cycles are of one step. By name also a step on one long row, and reads of arrays
(`--program "read with noise"`). libtpu's own compiler; counts are taken from its optimised HLO with the trips of every
loop (`_hlo.py`), of reads also from machine code (`_bundles.py`), since the compiler estimates no cycles of a Pallas
kernel. The roofline time is the larger of FLOPs and of bytes over a chip's published peaks
(https://cloud.google.com/tpu/docs/v6e), a bound from below and not a measurement. Needs the `aot-tpu` extra. Of an H100
(`aot-cuda`) only memory, precision and exchanges are shown.
"""

import collections
import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _bundles import bundles, dump
from _hlo import COLLECTIVES, Counts, below_highest, counts
from _measure import case
from _model import (
    BATCH,
    CHOICES,
    RANK,
    SOURCE,
    Composition,
    Dtype,
    arguments,
    config_of,
    held_in,
    precomputed,
    shapes_of,
    step_of,
)
from jax import Array
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    SingleDeviceSharding,
    use_abstract_mesh,
)
from jax.sharding import PartitionSpec as P

from lorafusion_jax import (
    Architecture,
    Frozen,
    Fusion,
    FusionRecipe,
    LoraPool,
    Problem,
    SharedBasis,
    crossbar,
    over_seeds,
)
from lorafusion_jax.crossbar.chip.plan import Split
from lorafusion_jax.crossbar.read import definition
from lorafusion_jax.estimates import (
    Settings,
    Shape,
    held_bytes,
    machine,
    program_of,
)
from lorafusion_jax.models import advance, begin, targeted
from lorafusion_jax.tasks import Batch
from lorafusion_jax.training import AXES, AXIS, Params, shardings

_GIB = 2**30
_K = 32
_NEW = 32  # tokens that are generated
_GROUP = 4  # layers that `compose` mixes at once
# of a read
_SIZE = 1024
_INPUTS = 256
# the larger of ours and the compiler's over the smaller
_MEMORY = 1.25
_FLOPS = 1.02
_PADDED = 1.99  # the padding of tiles, at most


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


_By = Literal["rows", "columns"] | None
# Reads by eight devices: each of a chip, or all of one matrix, whose columns or rows they share out.
_SHARED: dict[str, _By] = {
    "reads of eight arrays on a mesh of 8": None,
    "read of columns on a mesh of 8": "columns",
    "read of rows on a mesh of 8": "rows",
}


class _Chip(NamedTuple):
    topology: str
    accelerator: str
    flops: float  # of bfloat16, a second
    bandwidth: float  # bytes a second
    platform: str = "tpu"


_CHIPS = {
    "v5e": _Chip("v5e:2x4", "v5litepod-8", machine("v5e").peak["bfloat16"], 819e9),
    "v6e": _Chip("v6e:2x4", "v6e-8", machine("v6e").peak["bfloat16"], 1640e9),
    "h100": _Chip(
        "1x1x8",
        "NVIDIA H100 80GB HBM3",
        machine("h100").peak["bfloat16"],
        3350e9,
        "cuda",
    ),
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
    parser = _measure.parser(__doc__)
    parser.add_argument("--chip", choices=_CHIPS, default="v5e")
    parser.add_argument(
        "--shape", choices=CHOICES, default="small-pool", help="of the base model"
    )
    parser.add_argument(
        "--program",
        choices=[*_PROGRAMS, *_READS, *_SHARED],
        nargs="+",
        help="by default all but long rows and reads",
    )
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    chip = _CHIPS[options.chip]
    needed, extra = (
        ("libtpu", "aot-tpu")
        if chip.platform == "tpu"
        else ("jax_cuda12_plugin", "aot-cuda")
    )
    if importlib.util.find_spec(needed) is None:
        sys.exit(
            f"{needed}, which compiles for {options.chip}, is not installed: pip install -e '.[{extra}]'"
        )
    # A mesh is compiled for TPUs alone.
    usual = [
        name
        for name, of in _PROGRAMS.items()
        if of.source < 4096 and (chip.platform == "tpu" or not of.mesh)
    ]
    names = options.program or usual
    config = config_of(options.shape, "bfloat16")
    cases = []
    code = (
        dump()
        if chip.platform == "tpu" and not _READS.keys().isdisjoint(names)
        else None
    )
    for name in names:
        if name in _READS:
            cases += _read(
                f"{options.chip}, compiled, not run: {name}:", name, chip, code
            )
            continue
        if name in _SHARED:
            cases += _shared_out(
                f"{options.chip}, compiled, not run: {name}:", _SHARED[name], chip
            )
            continue
        where = f"{options.chip}, compiled, not run: {options.shape}, {name}, {options.seeds} seeds:"
        cases += measured(where, name, config, options.seeds, chip)
    _measure.show(cases, as_json=options.json)


def measured(
    where: str, name: str, config: Architecture, seeds: int, chip: _Chip
) -> list[dict[str, Any]]:
    """Compile one program for some seeds, and return its cases."""
    program = _PROGRAMS[name]
    devices = _devices(chip)
    if program.mesh is None:
        with _traced_for(devices[0]):
            lowered, planned, flops = _lowered(
                program, config, seeds, partial(_on, SingleDeviceSharding(devices[0]))
            )
        return [
            _precision(where, lowered),
            *_of_one_chip(
                where, lowered.compile(), planned, flops, chip, program.steps
            ),
        ]
    axes = (AxisType.Auto, AxisType.Auto)
    with jax.set_mesh(
        Mesh(
            np.reshape(devices[: math.prod(program.mesh)], program.mesh),
            AXES,
            axis_types=axes,
        )
    ):
        lowered, _, _ = _lowered(program, config, seeds, _on_mesh)
        return [
            _precision(where, lowered),
            *_of_a_mesh(where, lowered.compile(), config, program.mesh, chip),
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
) -> tuple[Any, float, float]:
    """Return a program to be compiled, and what the package plans for it on one device: bytes and FLOPs.

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
    needed = held_bytes(config, "fusion", settings) + planned.bytes
    return lowered, needed, seeds * (1 if generates else steps) * planned.flops


def _generate(params: Params, batch: Batch, problem: Problem, ended: Array) -> Array:
    """Return the ids of all seeds: what `runs.rows` computes for one batch in several calls, as one program.

    It ends once `ended` rows have ended, whose number is an argument so that the loop's one constant is its steps.
    """

    def of_seed(one: Problem, params: Params, batch: Batch) -> Array:
        model, adapters, _ = one.adapted_model(params)
        how: Any = {"max_new_tokens": _NEW, "row_mask": batch.row_mask}
        state = begin(model, batch.input_ids, batch.input_mask, adapters, **how)
        limits: Any = {"ended": ended, "most_steps": jnp.int32(_NEW)}
        return advance(model, state, adapters, **limits, axis=AXIS).tokens

    problem = problem.unstacked()
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
    below = below_highest(lowered.as_text())
    return case(
        f"{where} float32 products below highest", below.total(), 0, shapes=dict(below)
    )


def _of_one_chip(
    where: str, compiled: Any, planned: float, flops: float, chip: _Chip, steps: int
) -> list[dict[str, Any]]:
    memory = compiled.memory_analysis()
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    allocated = memory.argument_size_in_bytes + memory.temp_size_in_bytes + returned
    of_memory = case(
        f"{where} the compiler's memory / the plan's",
        allocated / planned,
        _MEMORY,
        arguments_gib=memory.argument_size_in_bytes / _GIB,
        temporaries_gib=memory.temp_size_in_bytes / _GIB,
        planned_gib=planned / _GIB,
    )
    if (
        chip.platform == "cuda"
    ):  # whose products are calls of libraries, and whose loops cannot be counted
        return [of_memory]
    found = counts(compiled.as_text())
    fill, written = max(
        found.filled.items(), key=lambda filled: filled[1], default=("nothing", 0)
    )
    return [
        of_memory,
        case(
            f"{where} FLOPs of the program and the plan's, the larger over the smaller",
            max(found.flops / flops, flops / found.flops),
            _FLOPS,
            tflop=found.flops / 1e12,
            planned_tflop=flops / 1e12,
        ),
        case(
            f"{where} collectives",
            found.collectives.total(),
            0,
            kinds=dict(found.collectives),
        ),
        case(
            f"{where} largest padding of a weight",
            max(found.padding.values()),
            _PADDED,
            arrays=found.padding,
        ),
        # Without a bar: heads and positions of a cache are padded.
        case(
            f"{where} largest padding in a loop",
            max(found.carried.values(), default=1),
            None,
            arrays=found.carried,
        ),
        case(
            f"{where} largest fill, every time it runs / largest array of a loop",
            written / steps / found.largest,
            1,
            by=fill,
            bytes=written,
        ),
        _time(where, found, chip, steps),
    ]


def _of_a_mesh(
    where: str, compiled: Any, config: Architecture, mesh: tuple[int, int], chip: _Chip
) -> list[dict[str, Any]]:
    found = counts(compiled.as_text())
    matrices = mesh[1]
    # A sum for each attention and feed-forward layer, forward and backward; and around the layers of the embedded
    # tokens, of the loss (twice), of the head's gradient, and of two metrics. The coefficients' gradient is summed for
    # every group of layers that `compose` mixes at once, where there are several.
    stated = (
        2
        * sum(
            stack.layers * (len(stack.attentions) + 1)
            for stack in config.stacks.values()
        )
        + 6
    )
    stated += sum(
        math.ceil(site.layers / _GROUP)
        for site in targeted(config, None).values()
        if site.layers > _GROUP
    )
    met = sum(
        len({device // matrices for device in group}) > 1 for group in found.groups
    )
    return [
        case(
            f"{where} collectives / those that are stated",
            found.collectives.total() / stated,
            1,
            kinds=dict(found.collectives),
            stated=stated,
        ),
        case(f"{where} groups of devices in which seeds meet", met, 0),
        _time(where, found, chip),
    ]


def _read(
    where: str, name: str, chip: _Chip, code: Path | None
) -> list[dict[str, Any]]:
    """Compile one read of arrays, and return its cases; machine code is in this folder."""
    dac = crossbar.DAC(signed=False, scaling="fixed", limit=1.0)
    adc = crossbar.ADC(bits=8, range="calibrated")
    of_cells, path = _READS[name]
    device = _devices(chip)[0]
    config = crossbar.CrossbarConfig(dac=dac, adc=adc, device=of_cells)
    for file in [] if code is None else code.iterdir():  # of earlier programs
        file.unlink()
    with _traced_for(device):
        w, x, key = jax.eval_shape(
            lambda: (
                jnp.zeros((_SIZE, _SIZE)),
                jnp.zeros((_INPUTS, _SIZE)),
                jax.random.key(0),
            )
        )
        arrays = jax.eval_shape(
            lambda w, key: crossbar.program(w, config, key, path=path), w, key
        )
        ranges = jax.ShapeDtypeStruct(
            (1, len(config.weight_slices), 2), w.dtype
        )  # which calibration will find
        arrays = dataclasses.replace(arrays, limits=ranges)
        read = jax.jit(
            lambda x, arrays, key: crossbar.matmul(
                x, crossbar.with_read_key(arrays, key)
            )
        )
        compiled: Any = read.lower(
            *_on(SingleDeviceSharding(device), (x, arrays, key))
        ).compile()
    share = compiled.memory_analysis().temp_size_in_bytes / definition.BUDGET
    how = {
        "path": arrays.plan.path,
        "temporaries_mib": share * definition.BUDGET / 2**20,
    }
    of_memory = case(f"{where} temporaries / 256 MiB", share, 1, **how)
    if code is None:
        return [of_memory]
    return [of_memory, _time(where, counts(compiled.as_text(), bundles(code)), chip)]


def _shared_out(where: str, by: _By, chip: _Chip) -> list[dict[str, Any]]:
    """Compile reads for one device and for eight, and return their cases."""
    compiled: list[Any] = []
    config = crossbar.CrossbarConfig(
        adc=crossbar.ADC(bits=8, range="max"), device=_IMPERFECT
    )
    for count in (1, 8):
        devices = np.reshape(_devices(chip)[:count], (1, count) if by else (count, 1))
        with jax.set_mesh(
            Mesh(devices, AXES, axis_types=(AxisType.Auto, AxisType.Auto))
        ):
            w = jax.ShapeDtypeStruct((_SIZE, _SIZE), jnp.float32)
            x = jax.ShapeDtypeStruct((_INPUTS, _SIZE), jnp.float32)
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
            arrays = jax.eval_shape(
                jax.vmap(
                    lambda key, w: crossbar.program(w, config, key),
                    (0, None),
                ),
                keys,
                w,
            )
            read = over_seeds(lambda one, x: crossbar.matmul(x, one), "batched")
            of_x = P()
            of_y = P("seed")
            if by is not None:
                arrays = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),
                    arrays,
                )
                arrays = dataclasses.replace(
                    arrays,
                    plan=dataclasses.replace(arrays.plan, split=Split(by, "model", 8)),
                )
                of_x = P(None, "model") if by == "rows" else P()
                of_y = P() if by == "rows" else P(None, "model")

                def read(one: crossbar.Chip, x: jax.Array) -> jax.Array:
                    return crossbar.matmul(x, one)

            given = (
                _on_mesh(arrays, of_seeds=by is None),
                _on(NamedSharding(jax.sharding.get_mesh(), of_x), x),
            )
            there = NamedSharding(jax.sharding.get_mesh(), of_y)
            compiled.append(jax.jit(read, out_shardings=there).lower(*given).compile())
    held = [program.memory_analysis().argument_size_in_bytes for program in compiled]
    found = collections.Counter(
        re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled[1].as_text())
    )
    cases = [
        # Rows add up their outputs, and take the range of an input vector from all of its numbers.
        case(
            f"{where} collectives",
            found.total(),
            2 if by == "rows" else 0,
            kinds=dict(found),
        ),
        # Every device has all inputs, or all of the inputs' ranges.
        case(
            f"{where} bytes of a device's arguments / an eighth of all",
            8 * held[1] / held[0],
            1.2,
        ),
    ]
    if chip.platform == "tpu":
        flops = [program.cost_analysis()["flops"] for program in compiled]
        cases.append(
            case(
                f"{where} FLOPs of a device / an eighth of all",
                8 * flops[1] / flops[0],
                1.05,
            )
        )
    return cases


def _time(where: str, found: Counts, chip: _Chip, steps: int = 1) -> dict[str, Any]:
    """Return the roofline time of a step, and what it is computed from."""
    flops = found.flops / steps
    moved = found.bytes / steps
    cycles = found.cycles / steps
    seconds = max(flops / chip.flops, moved / chip.bandwidth)
    rest: Any = {"tflop": flops / 1e12, "gb": moved / 1e9, "megacycles": cycles / 1e6}
    if found.bundles:
        rest["megabundles"] = found.bundles / 1e6
    return case(f"{where} roofline, ms", 1e3 * seconds, None, **rest)


if __name__ == "__main__":
    main()
