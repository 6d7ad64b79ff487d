"""Two processes, one run: the same numbers as one process, and a saved state after a signal to one of them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import recipes

from lorafusion_jax.cli import main

_SEEDS = tuple(range(1, 9))
_EPOCHS = 12


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone")
    main(_command(small, out)[3:])
    return out


def _command(small, out, *more):
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
    command += f"--task {recipes.TASK} --method coefficients --modules 2 --epochs {_EPOCHS}".split()
    command += (
        "--batch-size 95 --max-new-tokens 2 --test-rows 2 --save-seconds 1e9".split()
    )
    return [
        *command,
        *f"--out {out} --name run --seeds".split(),
        *map(str, _SEEDS),
        *more,
    ]


def _environment(devices, process, port):
    """Return an environment with so many devices, and what Slurm would say to a process of two."""
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
    return os.environ | xla | cluster


def _free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _start_two(command):
    port = _free_port()
    return [
        subprocess.Popen(
            command, env=_environment(2, process, port), stdout=-1, stderr=-1, text=True
        )
        for process in range(2)
    ]


def _saved(out):
    steps = [
        int(path.name.removeprefix("step_"))
        for path in out.glob("run/checkpoints/step_*")
    ]
    return max(steps, default=0)


def _wait_until(reached, processes):
    deadline = time.monotonic() + 240
    while (
        not reached()
        and all(p.poll() is None for p in processes)
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)


def _assert_same_files(out, alone):
    for name in ("metrics.jsonl", "predictions.jsonl"):
        assert (out / "run" / name).read_bytes() == (alone / "run" / name).read_bytes()


def _metrics(out):
    return [
        json.loads(line)
        for line in (out / "run" / "metrics.jsonl").read_text().splitlines()
    ]


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
        "error: another process of this run was stopped: start all again with --resume"
        in other
    )
    assert "Traceback" not in other + said
    assert 1 <= _saved(out) == max(row["step"] for row in _metrics(out)) < _EPOCHS
    # Four devices of two processes saved it; four of one go on, and come to the numbers of the one alone.
    main(_command(small, out, "--mesh", "seed=4", "--resume")[3:])
    _assert_same_files(out, alone)


@pytest.mark.long
def test_two_processes_make_the_run_of_one(small, alone, tmp_path):
    both = _start_two(_command(small, tmp_path, "--distributed", "--mesh", "seed=4"))
    printed, said = both[0].communicate(timeout=240)
    silent, _ = both[1].communicate(timeout=240)
    assert [process.returncode for process in both] == [0, 0], said
    assert "written to" in printed and "written to" not in silent
    _assert_same_files(tmp_path, alone)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--distributed", "--mesh", "seed=4"],
            "--distributed: JAX cannot join other processes here",
        ),
        (["--distributed"], "give a layout with --mesh"),
    ],
)
def test_a_process_without_others_is_refused(more, message, small, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(_command(small, tmp_path, *more)[3:])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
