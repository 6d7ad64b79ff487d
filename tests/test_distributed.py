"""Two processes, one run: the same numbers as one process, and a plain end when either of them is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import one_block
import pytest

from lorafusion_jax.train.options import FuseOptions
from lorafusion_jax.train.run import fuse

_SEEDS = tuple(range(1, 9))
_EPOCHS = 12
_TASK = one_block.SMALL / "tasks" / "double_digit"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    return one_block.cut(tmp_path_factory.mktemp("small"))


def _command(small: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    base, pool = small
    command = [sys.executable, "-m", "lorafusion_jax.cli", "fuse", "--base", str(base), "--pool", str(pool)]
    command += ["--task", str(_TASK), "--method", "coefficients", "--modules", "2", "--epochs", str(_EPOCHS)]
    command += ["--batch-size", "95", "--max-new-tokens", "2", "--test-rows", "2", "--save-seconds", "0"]
    return [*command, "--out", str(out), "--name", "run", "--seeds", *map(str, _SEEDS), *more]


def _environment(devices: int, process: int | None = None, port: int = 0) -> dict[str, str]:
    """Return an environment with so many devices, and for a process of two what Slurm would say to it."""
    slurm = {"JOB_ID": 1, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": process, "LOCALID": process}
    cluster = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    cluster |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    xla = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return os.environ | xla | (cluster if process is not None else {})


def _start_two(command: list[str]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(command, env=_environment(2, process, port), stdout=-1, stderr=-1, text=True)
        for process in range(2)
    ]


def _saved(out: Path) -> int:
    steps = [int(path.name.removeprefix("step_")) for path in out.glob("run/checkpoints/step_*")]
    return max(steps, default=0)


def _metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
