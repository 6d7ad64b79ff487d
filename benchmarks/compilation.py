"""Seconds from shapes to the compiled program of FLAN-T5-large's step: cold, and from JAX's persistent cache.

    python benchmarks/compilation.py [--shape flan-t5-large] [--unroll] [--json]

The step of one seed with its layers in a loop, or with --unroll one after the other: tracing, lowering and XLA. Each
in a process of its own, imports not counted, with a cache folder that is empty for the first and the first one's for
the second.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _measure
from _measure import ROOT, case
from _model import shape_parser

_REQUIRED = {"cold": 60.0, "from the persistent cache": 10.0}  # seconds

_COMPILE = """
import dataclasses, sys, time
from _model import apart, config_of, lowered, shapes_of
from lorafusion_jax import Fusion
shape, composition, layers = sys.argv[1:]
config = dataclasses.replace(config_of(shape), unroll=bool(layers))
weights = apart(shapes_of(config, "float32"))
began = time.perf_counter()
lowered(config, weights, Fusion(composition=composition)).compile()
print(time.perf_counter() - began)
"""


def main() -> None:
    parser = shape_parser(__doc__, "flan-t5-large")
    parser.add_argument("--unroll", action="store_true", help="the layers")
    options = parser.parse_args()
    _measure.launch()
    layers = ", unrolled" * options.unroll
    cases = [
        found
        for composition in ("mix", "sum")
        for found in _compile(options.shape, composition, layers)
    ]
    _measure.show(cases, as_json=options.json)


def _compile(shape: str, composition: str, layers: str) -> list[dict[str, Any]]:
    cases = []
    with tempfile.TemporaryDirectory() as cache:
        for when, limit in _REQUIRED.items():
            paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
            keep = {
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            done = subprocess.run(
                [sys.executable, "-c", _COMPILE, shape, composition, layers],
                env=os.environ | keep | {"PYTHONPATH": paths},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            seconds = float(done.stdout.splitlines()[-1])
            name = f"{shape}, {composition}{layers}: compilation of the step, {when} / {limit:g} s"
            cases.append(
                case(name, seconds / limit, 1.0, seconds=seconds, limit_seconds=limit)
            )
    return cases


if __name__ == "__main__":
    main()
