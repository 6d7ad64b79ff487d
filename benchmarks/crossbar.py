"""Reads of crossbars: time against the float32 products that a read consists of, memory, compilation.

    python benchmarks/crossbar.py [--json | --paths]

On a CPU everything runs on one thread. A weight of 1024 x 1024 in arrays of 128 x 128, differential, 8 bits in four
slices of 2; a batch of 256 inputs of 8 bits, one bit at a time; an ADC of 8 bits for every conversion, its range
calibrated. The floor of such a read is a loop of as many full products as it has pairs of slices: 32 for unsigned
inputs, 28 for signed ones. Floor and candidate take turns; ratios are those of their medians.

Prepared reads (input factors and a transform) are compared with the same reads without, by width; those of a single
product, without an ADC, have no bar.

`--paths` prints the time of a read by each path: of this weight, and of those of examples/smollm2/chip.yaml.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _measure import case, in_turns, of_turns, product_rates

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar.read import definition as crossbar_definition

_SIZE = 1024
_BATCH = 256
_CHIPS = 16
_CHIP_SIZE = 512
_CHIP_BATCH = 64
_REPEATS = 7
# inputs and outputs of prepared reads
_WIDTHS = (64, 576, 1024, 1536, 2816)
_OUTPUTS = 576
_CHIP = _measure.ROOT / "examples" / "smollm2" / "chip.yaml"
_DAC = crossbar.DAC(signed=False, scaling="fixed", limit=1.0)
_CELL = crossbar.Cell(bits=(2, 2, 2, 2))
_CONFIG = crossbar.CrossbarConfig(
    cell=_CELL, dac=_DAC, adc=crossbar.ADC(bits=8, range="calibrated")
)
_PATHS = ("lookup", "packed", "loop")
_PROGRAMMING = crossbar.Device(programming=crossbar.Independent(0.04))


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument(
        "--paths", action="store_true", help="print milliseconds of each path instead"
    )
    options = parser.parse_args()
    _measure.launch(1)
    if options.paths:
        _by_path()
        return
    _measure.show(_cases(), as_json=options.json, rates=product_rates(["float32"]))


def _cases() -> list[dict[str, Any]]:
    key = jax.random.key(0)
    w = jax.random.normal(key, (_SIZE, _SIZE))
    x = jax.random.uniform(jax.random.fold_in(key, 1), (_BATCH, _SIZE))
    config = _CONFIG
    signed = _with(_CONFIG, dac=dataclasses.replace(_DAC, signed=True))
    floor = _products(_BATCH, (_SIZE, _SIZE), 32)
    signed_floor = _products(_BATCH, (_SIZE, _SIZE), 28)
    single = _products(_BATCH, (_SIZE, _SIZE), 1)
    cases = [
        _read("integer cells, unsigned inputs", w, x, config, floor, (0.60, 0.20)),
        _read(
            "integer cells, signed inputs",
            w,
            2 * x - 1,
            signed,
            signed_floor,
            (0.65, 0.40),
        ),
        _read(
            "real-valued cells",
            w,
            x,
            _with(config, device=_PROGRAMMING),
            floor,
            (1.10, 0.60),
        ),
        _read("no ADC", w, x, _with(config, adc=None), single, (1.2, 1.0)),
        _read(
            "lossless ADC",
            w,
            x,
            _with(config, adc=crossbar.ADC(bits=10, range="granular")),
            single,
            (1.2, 1.0),
        ),
    ]
    for kind in ("proportional", "independent"):
        noisy = _with(
            config,
            adc=_given(w, x, config),
            device=crossbar.Device(read_noise=crossbar.ReadNoise(0.04, kind)),
        )
        cases.append(_read(f"{kind} read noise", w, x, noisy, floor, (3.0, 1.7)))
    cases.append(_chips(key))
    program = jax.jit(lambda w: crossbar.program(w, config))
    cases.append(
        _case(
            "programming",
            crossbar.program(w, config).plan.path,
            program,
            (w,),
            single,
            (2.0, 1.0),
        )
    )
    for width in _WIDTHS:
        cases += [
            _prepared(width, "bit-sliced", _CONFIG.adc, 1.15),
            _prepared(width, "product", None, None),
        ]
    return cases + _temporaries(
        w[:_CHIP_SIZE, :_CHIP_SIZE], x[:_CHIP_BATCH, :_CHIP_SIZE]
    )


def _by_path() -> None:
    """Print the milliseconds of reads by each path that is exact for them, as a Markdown table."""
    print(
        f"| read | vectors | {' | '.join(_PATHS)} |\n|---|{'---:|' * (1 + len(_PATHS))}"
    )
    noisy = crossbar.Device(read_noise=crossbar.ReadNoise(0.04))
    cells = {
        "integer cells": crossbar.Device(),
        "real cells": _PROGRAMMING,
        "read noise": noisy,
    }
    for bits, (name, device), signed in itertools.product(
        (1, 2), cells.items(), (False, True)
    ):
        dac = dataclasses.replace(_DAC, slice_bits=bits, signed=signed)
        read = f"{_SIZE} x {_SIZE}, {name}, {'signed ' if signed else ''}{bits}-bit input slices"
        _show_paths(
            read, _with(_CONFIG, dac=dac, device=device), (_SIZE, _SIZE), (_BATCH,)
        )
    chip = crossbar.load_config(_CHIP)
    assert chip.adc is not None
    chip = _with(chip, adc=dataclasses.replace(chip.adc, bits=6))
    for shape in ((1536, 576), (576, 576), (576, 192)):
        _show_paths(
            f"{shape[0]} x {shape[1]} of SmolLM2, ADC of 6 bits",
            chip,
            shape,
            (1, 16, 128),
        )


def _show_paths(
    name: str,
    config: crossbar.CrossbarConfig,
    shape: tuple[int, int],
    batches: tuple[int, ...],
) -> None:
    key = jax.random.key(0)
    w = jax.random.normal(key, shape)
    x = jax.random.uniform(jax.random.fold_in(key, 1), (max(batches), shape[0]))
    x = 2 * x - 1 if config.dac is not None and config.dac.signed else x
    chips = {}
    for path in _PATHS:
        with contextlib.suppress(ValueError):  # it would not be exact
            chip = crossbar.program(w, config, jax.random.key(1), path=path)
            chips[path] = crossbar.with_read_key(
                crossbar.calibrated(chip, crossbar.probe(x, chip)[1]), key
            )
    matmul = jax.jit(crossbar.matmul)
    for batch in batches:
        given = {path: (x[:batch], chip) for path, chip in chips.items()}
        runs = {
            path: lambda read=read: jax.block_until_ready(matmul(*read))
            for path, read in given.items()
        }
        medians = {
            path: 1e3 * np.median(seconds)
            for path, seconds in in_turns(runs, _REPEATS).items()
        }
        shown = (f"{medians[path]:.2g}" if path in medians else "" for path in _PATHS)
        print(f"| {name} | {batch} | {' | '.join(shown)} |", flush=True)


def _temporaries(w: jax.Array, x: jax.Array) -> list[dict[str, Any]]:
    """Compile, and do not run, reads that compute with every cell: 512 x 512, a batch of 64."""
    wires = crossbar.Tile(
        wire=crossbar.Wire(row_resistance=1e-3, column_resistance=1e-3)
    )
    sinh = crossbar.Device(iv=crossbar.Sinh())
    clipped = crossbar.Device(read_noise=crossbar.ReadNoise(0.01, clip=True))
    by_cell = {
        "wires": {"tile": wires},
        "wires and nonlinear cells": {"tile": wires, "device": sinh},
        "nonlinear cells": {"device": sinh},
        "clipped read noise": {"device": clipped},
    }
    cases = []
    for name, changes in by_cell.items():
        config = crossbar.CrossbarConfig(
            cell=_CELL, adc=crossbar.ADC(bits=8, range="max"), **changes
        )
        read = jax.jit(
            lambda x, state, key, config=config: crossbar.matmul(
                x, crossbar.with_read_key(state, key)
            )
        )
        compiled: Any = read.lower(
            x, crossbar.program(w, config), jax.random.key(2)
        ).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        name = f"crossbar, {name}: temporaries / 256 MiB"
        share = temporary / crossbar_definition.BUDGET
        cases.append(case(name, share, 1.0, temporary_mib=temporary / 2**20))
    return cases


def _with(config: crossbar.CrossbarConfig, **changes: Any) -> crossbar.CrossbarConfig:
    return dataclasses.replace(config, **changes)


def _read(
    name: str,
    w: jax.Array,
    x: jax.Array,
    config: crossbar.CrossbarConfig,
    floor: Callable[[], Any],
    limits: tuple[float, float],
) -> dict[str, Any]:
    """Time one read of a programmed and calibrated chip."""
    state = _calibrated(w, x, config)
    key = None if config.device.read_noise is None else jax.random.key(2)
    read = jax.jit(
        lambda x, state, key: crossbar.matmul(x, crossbar.with_read_key(state, key))
    )
    return _case(name, state.plan.path, read, (x, state, key), floor, limits)


def _calibrated(
    w: jax.Array, x: jax.Array, config: crossbar.CrossbarConfig
) -> crossbar.Chip:
    state = crossbar.program(w, config, jax.random.key(1))
    if config.adc is None or config.adc.range != "calibrated":
        return state
    probe = jax.jit(lambda x, state: crossbar.probe(x, state)[1])
    return crossbar.calibrated(state, probe(x, state))


def _given(w: jax.Array, x: jax.Array, config: crossbar.CrossbarConfig) -> crossbar.ADC:
    """Return the ADC with the range that one chip's calibration finds, for reads and chips that share it."""
    return crossbar.ADC(
        bits=8,
        range="given",
        limits=np.asarray(_calibrated(w, x, config).limits)[0].tolist(),
    )


def _prepared(
    width: int, kind: str, adc: crossbar.ADC | None, bar: float | None
) -> dict[str, Any]:
    """Time reads with input factors and a transform against the same reads without."""
    plain = crossbar.CrossbarConfig(
        cell=_CELL, mapping=crossbar.Mapping(scale="column"), adc=adc
    )
    changed = _with(
        plain,
        mapping=crossbar.Mapping(scale="column", factors=True, transform="hadamard"),
    )
    key = jax.random.key(0)
    w = jax.random.normal(key, (width, _OUTPUTS))
    x = jax.random.normal(jax.random.fold_in(key, 1), (_BATCH, width))
    made = crossbar.prepare({"w": w}, None, changed)["w"]
    chips = {
        "ours": crossbar.program(w, changed, key, preparation=made),
        "plain": crossbar.program(w, plain, key),
    }
    if adc is not None:
        chips = {
            name: crossbar.calibrated(chip, crossbar.probe(x, chip)[1])
            for name, chip in chips.items()
        }
    read = jax.jit(crossbar.matmul)
    runs = {
        name: lambda chip=chip: jax.block_until_ready(read(x, chip))
        for name, chip in chips.items()
    }
    seconds = in_turns(runs, _REPEATS)
    return case(
        f"crossbar, prepared {kind} read of {width} inputs / the same unprepared",
        of_turns(seconds["ours"], seconds["plain"]),
        bar,
        path=chips["ours"].plan.path,
        milliseconds=1e3 * float(np.median(seconds["ours"])),
        plain_milliseconds=1e3 * float(np.median(seconds["plain"])),
    )


def _chips(key: jax.Array) -> dict[str, Any]:
    """Program and read 16 chips, each from its key, with one ADC range."""
    w = jax.random.normal(key, (_CHIP_SIZE, _CHIP_SIZE))
    x = jax.random.uniform(jax.random.fold_in(key, 1), (_CHIP_BATCH, _CHIP_SIZE))
    config = _with(_CONFIG, device=_PROGRAMMING)
    config = _with(config, adc=_given(w, x, config))
    keys = jax.random.split(key, _CHIPS)

    def one(key: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
        return crossbar.matmul(x, crossbar.program(w, config, key))

    chips = jax.jit(lambda keys, w, x: jax.lax.map(lambda key: one(key, w, x), keys))
    path = crossbar.program(w, config, keys[0]).plan.path
    floor = _products(_CHIP_BATCH, (_CHIP_SIZE, _CHIP_SIZE), 32 * _CHIPS)
    return _case("16 noisy chips", path, chips, (keys, w, x), floor, (2.0, 1.2))


def _products(batch: int, size: tuple[int, int], count: int) -> Callable[[], Any]:
    """Return a compiled loop of full float32 products."""
    x = jax.random.normal(jax.random.key(3), (min(count, 4), batch, size[0]))
    w = jax.random.normal(jax.random.key(4), (min(count, 4), *size))

    def add(i: jax.Array, total: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        return total + jnp.dot(x[i % 4], w[i % 4], precision="highest")

    @jax.jit
    def products(x: jax.Array, w: jax.Array) -> jax.Array:
        zero = jnp.zeros((batch, size[1]))
        return (
            jax.lax.fori_loop(0, count, lambda i, total: add(i, total, x, w), zero)
            if count > 1
            else x[0] @ w[0]
        )

    return lambda: jax.block_until_ready(products(x, w))


def _case(
    name: str,
    path: str,
    function: Any,
    arguments: tuple[Any, ...],
    floor: Callable[[], Any],
    limits: tuple[float, float],
) -> dict[str, Any]:
    lowered = function.lower(*arguments)
    began = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - began
    runs = {"ours": lambda: jax.block_until_ready(compiled(*arguments)), "floor": floor}
    seconds = in_turns(runs, _REPEATS)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return case(
        f"crossbar, {name} / its float32 products",
        of_turns(seconds["ours"], seconds["floor"]),
        *limits,
        higher_is_better=False,
        path=path,
        milliseconds=1e3 * float(np.median(seconds["ours"])),
        floor_milliseconds=1e3 * float(np.median(seconds["floor"])),
        temporary_mib=temporary / 2**20,
        compile_seconds=compile_seconds,
    )


if __name__ == "__main__":
    main()
