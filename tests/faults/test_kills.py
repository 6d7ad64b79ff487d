"""Commands that are killed at random moments of their CPU time end in the same bits as an undisturbed one."""

import hashlib
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import one_block
import pytest
from json_files import read_json

from lorafusion_jax.io import ConvertedPool, store

_ROOT = Path(__file__).resolve().parents[2]
_TASK = one_block.SMALL / "tasks" / "double_digit"
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_LINES = {
    signal.SIGTERM: ("stopped by SIGTERM", "SIGTERM: saving after"),
    signal.SIGINT: ("stopped by Ctrl-C", "Ctrl-C: saving after"),
}
_ALWAYS_PRINTED = re.compile(
    r"going on from step|nothing to resume|^\[\d+/\d+\]|tiles for bfloat16"
)


def _convert(inputs, out):
    adapters = sorted((inputs / "pool").iterdir())
    command = f"-m lorafusion_jax.cli convert --base {inputs / 'base'}".split()
    return [*command, *f"--out {out / 'pool'} --basis 4 --adapters".split(), *adapters]


def _fuse(inputs, out):
    options = (
        "--name run --modules 2 --batch-size 48 --max-new-tokens 8 --test-rows 5 --seeds 1 2 --epochs 8 "
        "--save-seconds 0 --resume"
    )
    command = f"-m lorafusion_jax.cli fuse --base {inputs / 'base'}".split()
    paths = f"--pool {inputs / 'pool'} --task {_TASK} --out {out}".split()
    return [*command, *paths, *options.split()]


def _matrix(inputs, out):
    options = "--methods LoRAFusion zero-shot --modules 2 --test-rows 5 --seeds 1 2 --epochs 2"
    script = _ROOT / "experiments" / "small_pool.py"
    paths = f"--pool {inputs / 'pool'} --tasks {_TASK} --out {out}".split()
    return [script, "--base", inputs / "base", *paths, *options.split()]


def _bits(tree):
    return [
        hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for leaf in jax.tree.leaves(tree)
    ]


def _pool_outcome(out):
    pool = ConvertedPool(out / "pool")
    return pool.manifest["totals"], _bits((pool.load(), pool.basis()))


def _run_outcome(out):
    results = read_json(out / "run/results.json") | {"seconds": None}
    names = ("metrics.jsonl", "predictions.jsonl")
    texts = [(out / "run" / name).read_text() for name in names]
    trained, _ = store.load(out / "run/final", "training result")
    newest = [*store.steps(out / "run/checkpoints").values()][-1:]
    states = [store.load(folder, "checkpoint")[0] for folder in newest]
    return results, texts, _bits((trained, states))


def _matrix_outcome(out):
    lines = (out / "results.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": None, "config": None} for line in lines]


# Arguments by inputs and output folder, and what must be the same after a kill.
_COMMANDS = {
    "convert": (_convert, _pool_outcome),
    "fuse": (_fuse, _run_outcome),
    "matrix": (_matrix, _matrix_outcome),
}


def _start(arguments):
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
    environment = os.environ | {
        "PYTHONPATH": str(_ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)


def _finish(arguments):
    """Run a command to its end, and return its CPU time."""
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    process = _start(arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before


def _cpu_seconds(process):
    """Return the CPU time that a child has taken."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _kill(process, number, after):
    """Send a signal after some CPU time, and check how the process ends; False if it ended by itself before."""
    while process.poll() is None and _cpu_seconds(process) < after:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    if process.returncode == 0 or "/pool exists: give a new folder" in errors:
        return False
    lines = [line for line in errors.splitlines() if not _ALWAYS_PRINTED.search(line)]
    if process.returncode == -number:  # also in Python's own start and end
        assert not lines, errors
    else:
        assert process.returncode == 128 + number and len(lines) in (1, 2), errors
        assert all(line.startswith(_LINES[number]) for line in lines), errors
    return True


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    one_block.cut(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("convert", marks=pytest.mark.long),
        pytest.param("fuse", marks=pytest.mark.nightly),
        pytest.param("matrix", marks=pytest.mark.nightly),
    ],
)
def test_a_killed_command_ends_in_the_same_bits(name, inputs, tmp_path):
    arguments, outcome = _COMMANDS[name]
    _finish(arguments(inputs, tmp_path / "compiled"))
    seconds = _finish(arguments(inputs, tmp_path / "undisturbed"))
    killed = arguments(inputs, tmp_path / "killed")
    draw = random.Random(name)
    moments = [draw.uniform(0, 0.9 * seconds) for _ in _SIGNALS]
    for number, after in zip(
        (*_SIGNALS, signal.SIGKILL), (*moments, math.inf), strict=True
    ):
        if not _kill(_start(killed), number, after):
            break
    expected = outcome(tmp_path / "undisturbed")
    assert outcome(tmp_path / "killed") == expected
    assert not list(tmp_path.glob("killed/**/.*.partial/"))
