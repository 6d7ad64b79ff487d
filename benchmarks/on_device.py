"""What the package does on a GPU or a TPU: its tests there, then steps, seeds, generation and arrays.

    make gpu                # or make tpu: installs JAX for the device, and runs this
    python benchmarks/on_device.py --shape small-pool --no-tests     # tried out on a CPU

FLAN-T5-large's shape with 20 modules of rank 16 and random weights, in bfloat16; 128 source tokens, 5 rows and 8 target
tokens in a step, 10 rows and 32 new tokens in generation. Times are medians of rounds in turns; shares are of what one
bfloat16 product of large matrices reaches in the same run. PyTorch's step with PEFT takes turns with ours on the same
device, in bfloat16 and in float32 with TF32 off and on. Everything is printed, and written to OUT as JSON, in a file
named after the device.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _measure import ROOT, case, has_peft, in_turns, of_turns
from _model import (
    BATCH,
    CHOICES,
    MODULES,
    RANK,
    SOURCE,
    TARGET,
    Dtype,
    Step,
    answers,
    batch_of,
    config_of,
    frozen,
    in_basis,
    precomputed,
)
from _peer import Peer, lines_of

from lorafusion_jax import Fusion, FusionRecipe, crossbar
from lorafusion_jax.estimates import Settings, Shape, program_of
from lorafusion_jax.report import write_text

_K = 32  # directions of the shared basis
# of generation
_ROWS = 10
_NEW = 32
# of a read: width of the matrix, vectors
_WIDEST = 4096
_COLUMNS = 256
# Precision -> dtype, torch's setting of float32 products, and JAX's.
_PRECISIONS: dict[str, tuple[Dtype, str, str]] = {
    "bfloat16": ("bfloat16", "highest", "default"),
    "float32, TF32 off": ("float32", "highest", "highest"),
    "float32, TF32 on": ("float32", "high", "tensorfloat32"),
}
_TOGETHER = 0.6
_SHARE = (0.4, 0.6)
_PEER = 1.5
# Four slices of 2 bits, 8 unsigned input bits one by one, 8-bit ADCs: 32 products.
_ARRAYS = crossbar.CrossbarConfig(
    cell=crossbar.Cell(bits=(2, 2, 2, 2)),
    dac=crossbar.DAC(signed=False, scaling="fixed", limit=1.0),
    adc=crossbar.ADC(bits=8, range="max"),
)
_PRODUCTS = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=CHOICES, default="flan-t5-large", help="of the base model"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[8, 16], help="that share a program"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--product", type=int, default=8192, help="width of the matrices of the product"
    )
    parser.add_argument(
        "--no-tests", dest="tests", action="store_false", help="measure only"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "on_device",
        help="folder of the file",
    )
    options = parser.parse_args()
    if min(*options.seeds, options.rounds, options.product) < 1:
        parser.error("--seeds, --rounds and --product count from 1")
    options.out.mkdir(parents=True, exist_ok=True)
    tested = _tests() if options.tests else None
    device = jax.devices()[0]
    if device.platform == "cpu":
        print("JAX sees no GPU or TPU: these are a CPU's figures", file=sys.stderr)
    rate = _product_rate(options.product)
    cases = [
        *_steps(options, rate),
        *_against_peer(options),
        *_generation(options),
        *_arrays(options, rate),
    ]
    found = {
        "device": device.device_kind,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "tests": tested,
        "shape": options.shape,
        "product_tflops": rate / 1e12,
        "cases": cases,
    }
    name = f"{device.device_kind}-{options.shape}".lower().replace(" ", "-")
    write_text(options.out / f"{name}.json", json.dumps(found, indent=1) + "\n")
    tests = "not run" if tested is None else tested
    print(
        f"{device.device_kind}, jax {jax.__version__}, one bfloat16 product: {rate / 1e12:.4g} TFLOP/s, tests {tests}"
    )
    _measure.show(cases, as_json=False)
    print(f"written to {options.out / name}.json")
    if tested is not None and not tested.startswith("passed"):
        sys.exit(1)


def _tests() -> str:
    """Run the tests for accelerators in a process of their own, which lets go of the device, and say how they went."""
    platforms = {"JAX_PLATFORMS": "", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    script = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "accelerator",
        "--durations=0",
        str(ROOT / "tests"),
    ]
    ran = subprocess.run(script, cwd=ROOT, env=os.environ | platforms)
    return "passed" if ran.returncode == 0 else f"failed, exit code {ran.returncode}"


def _product_rate(width: int) -> float:
    """Return the FLOP/s of one bfloat16 product."""
    x = jnp.ones((width, width), jnp.bfloat16)
    product = jax.jit(jnp.dot)
    (seconds,) = in_turns(
        {"product": lambda: jax.block_until_ready(product(x, x))}, 5
    ).values()
    return 2 * width**3 / float(seconds.min())


def _steps(options: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    config = config_of(options.shape, "bfloat16")
    weights = jax.block_until_ready(frozen(config, "bfloat16", MODULES))
    basis = in_basis(config, weights, _K)
    runs: dict[str, Any] = {
        "mix": Step(config, weights, "mix"),
        "sum": Step(
            config, precomputed(config, Fusion(composition="sum"), weights), "sum"
        ),
        "basis": Step(config, basis, "sum"),
    }
    runs |= {
        f"mix, {count} seeds": Step(config, weights, "mix", seeds=count)
        for count in options.seeds
    }
    seconds = in_turns(runs, options.rounds)
    settings = Settings(
        recipe=FusionRecipe(modules=MODULES, composition="mix"),
        rank=RANK,
        seeds=1,
        device="accelerator",
    )
    shape = Shape(BATCH, SOURCE, TARGET)
    flops = program_of(config, "fusion", settings, "step", shape).flops
    cases = [
        case(
            f"a step: {name} / mix",
            of_turns(seconds[name], seconds["mix"]),
            None,
            milliseconds=_ms(seconds[name]),
        )
        for name in ("mix", "sum", "basis")
    ]
    for count in options.seeds:
        together = seconds[f"mix, {count} seeds"]
        cases.append(
            case(
                f"{count} seeds in one program / {count} single steps",
                of_turns(together, count * seconds["mix"]),
                _TOGETHER,
                milliseconds=_ms(together),
            )
        )
        share = count * flops / float(np.median(together)) / rate
        bars = _SHARE if count == max(options.seeds) else (None, None)
        cases.append(
            case(
                f"{count} seeds: share of the product's rate",
                share,
                *bars,
                higher_is_better=True,
            )
        )
    return cases


def _against_peer(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare a step with PyTorch's on the same device, in every precision of products."""
    platform = jax.devices()[0].platform
    if not has_peft() or platform == "tpu":
        print(
            "PyTorch and PEFT are left out: not installed (pip install -e '.[peft]'), or a TPU",
            file=sys.stderr,
        )
        return []
    import torch

    device = "cuda" if platform == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "PyTorch sees no GPU, so it is left out: install its build with CUDA",
            file=sys.stderr,
        )
        return []
    cases = []
    for name, (dtype, theirs, ours) in _PRECISIONS.items():
        config = config_of(options.shape, dtype)
        weights = jax.block_until_ready(frozen(config, dtype, MODULES))
        peer = Peer(config, weights, dtype, device)
        step = Step(config, weights, "mix")
        inputs = peer.inputs(
            lines_of(config, jax.tree.map(lambda a: a[0], batch_of(config)))
        )
        torch.set_float32_matmul_precision(
            theirs
        )  # its loss is read, so a step has ended when it returns
        with jax.default_matmul_precision(ours):
            seconds = in_turns(
                {"peer": lambda p=peer, i=inputs: p(i), "ours": step}, options.rounds
            )
        cases.append(
            case(
                f"PyTorch and PEFT / our step: mix, {name}",
                of_turns(seconds["peer"], seconds["ours"]),
                _PEER if dtype == "bfloat16" else None,
                higher_is_better=True,
                milliseconds=_ms(seconds["peer"]),
                our_milliseconds=_ms(seconds["ours"]),
            )
        )
    return cases


def _generation(options: argparse.Namespace) -> list[dict[str, Any]]:
    config = config_of(options.shape, "bfloat16")
    weights = precomputed(
        config, Fusion(composition="sum"), frozen(config, "bfloat16", MODULES)
    )
    batch = jax.tree.map(lambda a: a[0], batch_of(config, (_ROWS, SOURCE, TARGET)))
    runs = {}
    for count in (1, max(options.seeds)):
        step = Step(config, weights, "sum", seeds=count)
        runs[count] = lambda s=step: answers(s.state.params, batch, s.problem, _NEW)
    seconds = in_turns({str(count): run for count, run in runs.items()}, options.rounds)
    many = max(options.seeds)
    return [
        case(
            f"generation, sum: {many} seeds in one program / {many} single ones",
            of_turns(seconds[str(many)], many * seconds["1"]),
            None,
            tokens_a_second=many * _ROWS * _NEW / float(np.median(seconds[str(many)])),
            tokens_a_second_of_one=_ROWS * _NEW / float(np.median(seconds["1"])),
        )
    ]


def _arrays(options: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """Compare a read of arrays with bfloat16 products of all slices of weights and inputs."""
    width = min(options.product, _WIDEST)
    chip = crossbar.program(
        jax.random.normal(jax.random.key(0), (width, width)), _ARRAYS, jax.random.key(1)
    )
    x = jax.random.uniform(jax.random.key(2), (_COLUMNS, width))
    read = jax.jit(crossbar.matmul)
    (seconds,) = in_turns(
        {"read": lambda: jax.block_until_ready(read(x, chip))}, options.rounds
    ).values()
    share = _PRODUCTS * 2 * _COLUMNS * width**2 / float(np.median(seconds)) / rate
    name = f"a read of {width} x {width} weights, batch {_COLUMNS} ({chip.plan.path}): share of the product's rate"
    return [case(name, share, None, higher_is_better=True, milliseconds=_ms(seconds))]


def _ms(seconds: np.ndarray) -> float:
    return 1e3 * float(np.median(seconds))


if __name__ == "__main__":
    main()
