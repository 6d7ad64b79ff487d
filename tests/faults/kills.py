"""Kills commands at random moments, and compares what they resume to with what they come to undisturbed.

    python tests/faults/kills.py --kills 50
    python tests/faults/kills.py --kills 10 --command fuse matrix --seed 2

A command is started again and again in one folder, until it ends by itself. The moment of a kill is drawn from the CPU
time that the command takes, so it does not depend on what else the machine does; half of the kills wait until something
is half written. In Python's own start signals are not handled yet. Printed is a table, then every fault; the exit code
is 1 if there is any. Ctrl-C goes on with the next command.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import one_block

_ROOT = Path(__file__).resolve().parents[2]
_TASK = one_block.SMALL / "tasks" / "double_digit"
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_CHAIN = 6  # kills in one folder
_START = 0.1  # seconds of CPU time until a command handles signals, Python's own start included
_SAID = {
    signal.SIGTERM: ("stopped by SIGTERM", "SIGTERM: saving after"),
    signal.SIGINT: ("stopped by Ctrl-C", "Ctrl-C: saving after"),
}
_NOTES = re.compile(
    r"going on from step|nothing to resume|^\[\d+/\d+\]"
)  # lines that are printed anyway
_QUICK = (
    "--modules 2 --batch-size 48 --max-new-tokens 8 --test-rows 5 --seeds 1 2".split()
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that is killed.

    Attributes:
      arguments: of Python, from the inputs and the folder to write to.
      outcome: what has to be the same, from what was printed and the folder.
      writes: it writes for long enough to be caught at it.
      compiles: its programs are not those that made the inputs.
    """

    arguments: Callable[["Inputs", Path], list[str]]
    outcome: Callable[[str, Path], Any]
    writes: bool = True
    compiles: bool = False


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What commands read: base and adapters of one block, and a run of them."""

    base: Path
    pool: Path
    run: Path


def _cli(*arguments: str | Path) -> list[str]:
    return ["-m", "lorafusion_jax.cli", *map(str, arguments)]


def _convert(inputs: Inputs, out: Path, *more: str) -> list[str]:
    adapters = sorted(inputs.pool.iterdir())
    return _cli(
        "convert",
        "--base",
        inputs.base,
        "--out",
        out / "pool",
        "--adapters",
        *adapters,
        *more,
    )


def _fuse(inputs: Inputs, out: Path, epochs: str = "8") -> list[str]:
    where = (
        "--base",
        inputs.base,
        "--pool",
        inputs.pool,
        "--task",
        _TASK,
        "--out",
        out,
        "--name",
        "run",
    )
    return _cli(
        "fuse", *where, *_QUICK, "--epochs", epochs, "--save-seconds", "0", "--resume"
    )


def _matrix(inputs: Inputs, out: Path) -> list[str]:
    options = "--methods LoRAFusion zero-shot --modules 2 --test-rows 5 --seeds 1 2 --epochs 2".split()
    where = (
        "--base",
        inputs.base,
        "--pool",
        inputs.pool,
        "--tasks",
        _TASK,
        "--out",
        out,
    )
    return list(map(str, (_ROOT / "experiments" / "small_pool.py", *where, *options)))


def _evaluate(inputs: Inputs, out: Path) -> list[str]:
    shutil.copytree(inputs.run, out / "run", dirs_exist_ok=True)
    return _cli("evaluate", "--run", out / "run", "--test-rows", "3")


def _bits(tree: Any) -> str:
    import jax
    import numpy as np

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(
            f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode()
            + array.tobytes()
        )
    return digest.hexdigest()


def _of_pool(printed: str, out: Path) -> Any:
    from lorafusion_jax.io import ConvertedPool

    pool = ConvertedPool(out / "pool")
    loaded = pool.load()
    found = [pool.manifest["totals"], list(pool.names), _bits((loaded.A, loaded.B))]
    return (
        [*found, _bits([pool.basis().U, pool.basis().V, pool.basis().S])]
        if (out / "pool/basis").exists()
        else found
    )


def _of_run(printed: str, out: Path) -> Any:
    from lorafusion_jax.io import store

    run = out / "run"
    results = json.loads((run / "results.json").read_text())
    del results["seconds"]
    files = [
        (run / name).read_text() for name in ("metrics.jsonl", "predictions.jsonl")
    ]
    states = [
        store.load(folder, "checkpoint")[0]
        for folder in store.steps(run / "checkpoints")
    ]
    return [
        results,
        files,
        _bits(
            [
                store.load(run / "final", "training result")[0],
                states[-1:],
            ]
        ),
    ]


def _of_matrix(printed: str, out: Path) -> Any:
    rows = [
        json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()
    ]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "config")} for row in rows
    ]


COMMANDS = {
    "convert": Command(_convert, _of_pool),
    "convert --basis": Command(
        lambda inputs, out: _convert(inputs, out, "--basis", "4"), _of_pool
    ),
    "fuse": Command(_fuse, _of_run),
    "matrix": Command(_matrix, _of_matrix, compiles=True),
    "evaluate": Command(
        _evaluate, lambda printed, out: printed, writes=False, compiles=True
    ),
}


@dataclasses.dataclass
class Tally:
    """Outcomes of one command: its kills by signal, those while something was half written, and what came of them."""

    kills: Counter[signal.Signals] = dataclasses.field(default_factory=Counter)
    while_writing: int = 0
    in_start: int = 0
    compared: int = 0
    same: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)


def make_inputs(folder: Path) -> Inputs:
    """Write the inputs."""
    one_block.cut(folder)
    _whole(_fuse(Inputs(folder / "base", folder / "pool", folder), folder, "1"))
    return Inputs(folder / "base", folder / "pool", folder / "run")


def kill(
    command: Command, inputs: Inputs, folder: Path, kills: int, seed: int
) -> Tally:
    """Kill a command so many times, in several folders, and compare what each of them ends in; Ctrl-C ends this."""
    tally = Tally()
    with contextlib.suppress(KeyboardInterrupt):
        _kill(command, inputs, folder, kills, seed, tally)
    return tally


def _undisturbed(command: Command, inputs: Inputs, folder: Path) -> tuple[Any, float]:
    """Return what a command comes to, as JSON, and its CPU time."""
    (folder / "whole").mkdir(parents=True)
    if command.compiles:
        (folder / "compiled").mkdir()
        _whole(command.arguments(inputs, folder / "compiled"))
    printed, seconds = _whole(command.arguments(inputs, folder / "whole"))
    return json.loads(json.dumps(command.outcome(printed, folder / "whole"))), seconds


def _kill(
    command: Command, inputs: Inputs, folder: Path, kills: int, seed: int, tally: Tally
) -> None:
    wanted, seconds = _undisturbed(command, inputs, folder)
    missed = 0  # times that the command ended before its kill
    while (done := tally.kills.total()) < kills:
        out = folder / f"{done}"
        draw = random.Random(f"{folder.name} {seed} {done}{missed * ' again'}")
        shutil.rmtree(out, ignore_errors=True)  # that of a kill which came too late
        out.mkdir()
        for _ in range(min(kills - done, _CHAIN)):
            if not _killed(command, inputs, out, seconds, draw, tally):
                break
        ended = subprocess.run(
            [sys.executable, *command.arguments(inputs, out)], **_how()
        )
        tally.compared += 1
        if ended.returncode and not _is_done(ended.stderr, out):
            tally.faults.append(
                f"{out}: resumed with exit code {ended.returncode}: {ended.stderr[-600:]}"
            )
        elif left := [str(path) for path in _unfinished(out) if path.is_dir()]:
            tally.faults.append(f"{out}: left behind: {', '.join(left)}")
        elif (
            got := json.loads(json.dumps(command.outcome(ended.stdout, out)))
        ) != wanted:
            tally.faults.append(f"{out}: other bits: {got} != {wanted}"[:2000])
        else:
            tally.same += 1
            shutil.rmtree(out)
        missed = missed + 1 if tally.kills.total() == done else 0


def _killed(
    command: Command,
    inputs: Inputs,
    out: Path,
    seconds: float,
    draw: random.Random,
    tally: Tally,
) -> bool:
    """Start a command and kill it, unless it ends before that; return whether it was killed."""
    number = draw.choice(_SIGNALS)
    after = draw.uniform(0, seconds)
    wait_for_writing = command.writes and draw.random() < 0.5
    pause = draw.uniform(0, 0.02)
    process = subprocess.Popen(
        [sys.executable, *command.arguments(inputs, out)], **_how()
    )
    while process.poll() is None and _cpu_seconds(process.pid) < after:
        time.sleep(0.005)
    while wait_for_writing and process.poll() is None and not any(_unfinished(out)):
        time.sleep(0.001)
    time.sleep(pause if wait_for_writing else 0)
    if process.poll() is not None:
        _, said = process.communicate()
        if process.returncode and not _is_done(said, out):
            tally.faults.append(
                f"{out}: ended by itself with {process.returncode}: {said[-600:]}"
            )
        return False
    early = _cpu_seconds(process.pid) < _START
    writing = any(_unfinished(out))
    process.send_signal(number)
    try:
        _, said = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
        tally.faults.append(
            f"{number.name} after {after:.2f} s of CPU time did not end it: {said[-600:]}"
        )
        return True
    if process.returncode == 0 or _is_done(said, out):
        return False
    tally.kills[number] += 1
    tally.while_writing += writing
    lines = [line for line in said.splitlines() if not _NOTES.search(line)]
    if number == signal.SIGKILL:
        sound = process.returncode == -number and not lines
    elif early and (process.returncode == -number or "KeyboardInterrupt" in said):
        tally.in_start += 1
        sound = True
    else:
        sound = (
            process.returncode == 128 + number
            and len(lines) in (1, 2)
            and all(line.startswith(_SAID[number]) for line in lines)
        )
    if not sound:
        tally.faults.append(
            f"{out}, {number.name} after {after:.2f} s of CPU time: exit code {process.returncode}: {said[-600:]}"
        )
    return True


def _is_done(said: str, out: Path) -> bool:
    """Return whether a conversion ended because the one before had come to its end."""
    return f"{out / 'pool'} exists" in said


def _how() -> dict[str, Any]:
    """Return how commands are started: every program is kept in the compilation cache."""
    own = {
        "PYTHONPATH": str(_ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
    environment = os.environ | own | {"JAX_COMPILATION_CACHE_DIR": cache}
    return {
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }


def _whole(arguments: list[str]) -> tuple[str, float]:
    """Run a command to its end; return what it printed and its CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, *arguments], **_how())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {ended.stderr}")
    return (
        ended.stdout,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


def _cpu_seconds(process: int) -> float:
    """Return the CPU time that a child has taken."""
    user, system = (
        Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    )
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _unfinished(out: Path) -> Iterator[Path]:
    """Yield what is being written."""
    for folder in ("", "*/", "*/checkpoints/", "runs/*/checkpoints/"):
        yield from out.glob(f"{folder}.*.partial")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="kills of each command")
    parser.add_argument(
        "--command",
        nargs="+",
        default=list(COMMANDS),
        choices=COMMANDS,
        metavar="COMMAND",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments and signals"
    )
    given = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # also where a shell started this in the background
    faults = []
    head = [
        "kills",
        *(number.name for number in _SIGNALS),
        "while writing",
        "in the start",
        "same bits",
        "faults",
    ]
    print(f"| command | {' | '.join(head)} |\n|---|{'---:|' * len(head)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(Path(folder) / "inputs")
        for name in given.command:
            tally = kill(
                COMMANDS[name],
                inputs,
                Path(folder) / name.replace(" ", ""),
                given.kills,
                given.seed,
            )
            cells = [
                tally.kills.total(),
                *(tally.kills[number] for number in _SIGNALS),
                tally.while_writing,
            ]
            cells += [
                tally.in_start,
                f"{tally.same} of {tally.compared}",
                len(tally.faults),
            ]
            print(f"| `{name}` | {' | '.join(map(str, cells))} |", flush=True)
            faults += tally.faults
    print(*faults, sep="\n\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
