"""Two processes, one run: the same numbers as one process, and a plain end when either of them is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import recipes

from lorafusion_jax.cli import main

_SEEDS = tuple(range(1, 9))
_EPOCHS = 12


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone")
    main(_command(small, out)[3:])
    return out


def _command(small: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    base, pool = small
    command = [
        sys.executable,
        "-m",
        "lorafusion_jax.cli",
        "fuse",
        "--base",
        str(base),
        "--pool",
        str(pool),
    ]
    command += [
        "--task",
        str(recipes.TASK),
        "--method",
        "coefficients",
        "--modules",
        "2",
        "--epochs",
        str(_EPOCHS),
    ]
    command += [
        "--batch-size",
        "95",
        "--max-new-tokens",
        "2",
        "--test-rows",
        "2",
        "--save-seconds",
        "1e9",
    ]
    return [
        *command,
        "--out",
        str(out),
        "--name",
        "run",
        "--seeds",
        *map(str, _SEEDS),
        *more,
    ]


def _environment(
    devices: int, process: int | None = None, port: int = 0
) -> dict[str, str]:
    """Return an environment with so many devices, and for a process of two what Slurm would say to it."""
    slurm = {
        "JOB_ID": 1,
        "STEP_NODELIST": "localhost",
        "NTASKS": 2,
        "PROCID": process,
        "LOCALID": process,
    }
    cluster = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    cluster |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    # The others are those of the tests: code that LLVM optimised otherwise has other last bits.
    flags = [
        flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag
    ]
    xla = {
        "XLA_FLAGS": " ".join(
            [*flags, f"--xla_force_host_platform_device_count={devices}"]
        )
    }
    return os.environ | xla | (cluster if process is not None else {})


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _start_two(command: list[str]) -> list[subprocess.Popen]:
    port = _free_port()
    return [
        subprocess.Popen(
            command, env=_environment(2, process, port), stdout=-1, stderr=-1, text=True
        )
        for process in range(2)
    ]


def _saved(out: Path) -> int:
    steps = [
        int(path.name.removeprefix("step_"))
        for path in out.glob("run/checkpoints/step_*")
    ]
    return max(steps, default=0)


def _wait_until(reached: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 240
    while (
        not reached()
        and all(p.poll() is None for p in processes)
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)


def _assert_goes_on(small: tuple[Path, Path], out: Path, alone: Path) -> None:
    """Check that a process with four devices goes on with a run, to the numbers of the one alone."""
    main(_command(small, out, "--mesh", "seed=4", "--resume")[3:])
    for name in ("metrics.jsonl", "predictions.jsonl"):
        assert (out / "run" / name).read_bytes() == (alone / "run" / name).read_bytes()


def _metrics(out: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (out / "run" / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.nightly
def test_a_run_that_loses_a_process_ends_and_goes_on_elsewhere(small, alone, tmp_path):
    out = tmp_path / "lost"
    both = _start_two(
        _command(small, out, "--distributed", "--mesh", "seed=4", "--save-seconds", "0")
    )
    _wait_until(lambda: _saved(out) >= 2, both)
    both[1].kill()
    lost = time.monotonic()
    printed, said = both[0].communicate(timeout=60)
    end = time.monotonic()
    both[1].communicate()
    assert end - lost < 30
    assert both[0].returncode == os.EX_TEMPFAIL, said
    assert (
        "error: another process of this run is lost: start all processes again with --resume"
        in said
    )
    assert "Traceback" not in said and "written to" not in printed
    saved = _saved(out)
    reached = max(row["step"] for row in _metrics(out))
    assert (
        2 <= saved <= reached <= saved + 1 < _EPOCHS
    )  # an interval is an epoch here, and an epoch a step
    # Four devices of two processes saved it; four of one go on, and one alone comes to the same numbers.
    _assert_goes_on(small, out, alone)


@pytest.mark.long
def test_a_signal_to_one_process_saves_the_step_of_all(small, alone, tmp_path):
    out = tmp_path / "stopped"
    both = _start_two(_command(small, out, "--distributed", "--mesh", "seed=4"))
    metrics = out / "run" / "metrics.jsonl"
    _wait_until(lambda: metrics.exists() and '"step": 2' in metrics.read_text(), both)
    both[1].send_signal(signal.SIGTERM)
    _, other = both[0].communicate(timeout=60)
    _, said = both[1].communicate(timeout=60)
    assert both[1].returncode == 143, said
    assert re.search(
        r"SIGTERM: saving after this epoch \(the last one took [\d.]+ s\)\. Once more",
        said,
    ), said
    assert both[0].returncode == os.EX_TEMPFAIL, other
    assert (
        "error: another process of this run was stopped: start all processes again with --resume"
        in other
    )
    assert "Traceback" not in other + said
    assert 1 <= _saved(out) == max(row["step"] for row in _metrics(out)) < _EPOCHS
    _assert_goes_on(small, out, alone)


_JOINED = """
import time
from lorafusion_jax.support import interrupts
interrupts.watch()
from lorafusion_jax.support import processes
with processes.joined():
    print(processes.first(), flush=True)
    time.sleep(60)
"""


def test_the_other_process_ends_plainly_when_process_0_is_lost():
    both = _start_two([sys.executable, "-c", _JOINED])
    assert both[1].stdout is not None
    assert both[1].stdout.readline() == "False\n"
    both[0].kill()
    _, said = both[1].communicate(timeout=60)
    both[0].communicate()
    assert both[1].returncode == os.EX_TEMPFAIL
    assert (
        "error: process 0 of this run is lost: start all processes again with --resume"
        in said
    )


def test_a_process_ends_plainly_when_another_one_never_starts():
    alone = _JOINED.replace("with processes", "processes.ARRIVAL = 1\nwith processes")
    done = subprocess.run(
        [sys.executable, "-c", alone],
        env=_environment(2, 0, _free_port()),
        capture_output=True,
    )
    assert done.returncode == os.EX_TEMPFAIL
    assert (
        b"error: not all processes of this run started within 1 s: start all processes again"
        in done.stderr
    )


@pytest.mark.long
def test_processes_that_are_started_by_hand_make_one_run(small, alone, tmp_path):
    command = _command(small, tmp_path, "--distributed", "--mesh", "seed=4")
    by_hand = [
        "--coordinator",
        f"localhost:{_free_port()}",
        "--processes",
        "2",
        "--process",
    ]
    both = [
        subprocess.Popen(
            [*command, *by_hand, str(process)],
            env=_environment(2),
            stdout=-1,
            stderr=-1,
            text=True,
        )
        for process in range(2)
    ]
    printed, said = both[0].communicate(timeout=240)
    silent, _ = both[1].communicate(timeout=240)
    assert [process.returncode for process in both] == [0, 0], said
    assert "written to" in printed and "written to" not in silent
    for name in ("metrics.jsonl", "predictions.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (
            alone / "run" / name
        ).read_bytes()


_MESH = ("--distributed", "--mesh", "seed=4")
_BY_HAND = ("--coordinator", "localhost:1", "--processes", "2", "--process")


def test_options_of_processes_that_contradict_each_other_are_refused(
    small, tmp_path, capsys
):
    for more, message in (
        (_MESH, "--distributed: JAX cannot join other processes here"),
        (["--distributed"], "give a layout with --mesh"),
        (["--coordinator", "localhost:1"], "give all three, with --distributed"),
        ([*_MESH, "--processes", "2", "--process", "0"], "give all three"),
        ([*_BY_HAND, "0"], "give all three, with --distributed"),
        *(
            (
                [*_MESH, "--coordinator", address, *_BY_HAND[2:], "0"],
                f"expected host:port, such as host0:12345, got {address!r}",
            )
            for address in ("host0", "host0:", "host0:http", "host0:99999", ":12345")
        ),
        ([*_MESH, *_BY_HAND, "2"], "--process 2 of --processes 2: give 0 to 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(_command(small, tmp_path, *more)[3:])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
