"""A run on disk: its options, its metrics and its results.

    runs/NAME/config.json         options, environment, modules by seed
    runs/NAME/metrics.jsonl       a line for each step and seed, and for each epoch and seed
    runs/NAME/checkpoints/        step_000123: the whole state, to go on from; final: the trained numbers
    runs/NAME/predictions.jsonl   a line for each seed and test row
    runs/NAME/results.json        last of all, so a run that has it is complete

A folder is locked while a process writes to it. If a run has several processes, only the first one writes.
"""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import write_text
from ..io import processes

_CONFIG = "config.json"
_METRICS = "metrics.jsonl"
_PREDICTIONS = "predictions.jsonl"
_RESULTS = "results.json"


class RunFolder:
    """The files of one run. Writers hold its lock (`locked`)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out, for as long as this one lives.

        Raises:
          ValueError: another process is writing to the run.
        """
        if not processes.first():
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise ValueError(
                    f"{self.folder} is in use by process {lock.read().strip() or 'unknown'}: wait for it, or "
                    "give this run another --name"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def exists(self) -> bool:
        """Return whether a run was begun here."""
        return (self.folder / _CONFIG).is_file()

    def config(self) -> dict[str, Any]:
        """Return the recorded configuration of the run.

        Raises:
          ValueError: the folder is not a run.
        """
        if not self.exists():
            raise ValueError(f"{self.folder} is not a run: it has no {_CONFIG}")
        return json.loads((self.folder / _CONFIG).read_text())

    def results(self) -> dict[str, Any] | None:
        """Return the results, or None if the run is not complete."""
        path = self.folder / _RESULTS
        return json.loads(path.read_text()) if path.is_file() else None

    def metrics(self) -> list[dict[str, Any]]:
        """Return all lines of the metrics."""
        path = self.folder / _METRICS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def predictions(self) -> list[dict[str, Any]]:
        """Return the model's recorded answers to every row."""
        return [json.loads(line) for line in (self.folder / _PREDICTIONS).read_text().splitlines()]

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the configuration of the run."""
        _write(self.folder / _CONFIG, json.dumps(config, indent=1) + "\n")

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write the results, which completes the run; a number that is not finite is null."""
        _write(self.folder / _RESULTS, json.dumps(_finite(results), indent=1) + "\n")

    def write_predictions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the model's answers to every row."""
        _write(self.folder / _PREDICTIONS, "".join(json.dumps(row) + "\n" for row in rows))

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to the metrics; a number that is not finite is null."""
        lines = [json.dumps(_finite(row)) + "\n" for row in rows]
        if processes.first():
            with open(self.folder / _METRICS, "a") as file:
                file.write("".join(lines))

    def cut_metrics(self, step: int) -> None:
        """Remove lines after a step, and a line that a killed process left unfinished."""
        path = self.folder / _METRICS
        if not path.is_file():
            return
        kept = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        _write(path, "".join(kept))


def _finite(value: Any) -> Any:
    """Return the value with null for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    if processes.first():
        write_text(path, text)
