"""Runs whose results are rows of one JSONL file; none is run twice.

A job that runs out of memory has no result. It is a line of `failed.jsonl` next to that file, and is not tried again.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from ..estimates.plan import PROCESS_BYTES, run_cost
from ..io.hf import open_base
from ..io.pool import open_pool
from ..runs.folder import RunFolder, RunResults, run_path
from ..runs.options import FuseOptions, options_to_json
from ..runs.start import with_targets
from ..support.reading import read_lines
from .engines import LOCAL, EngineOptions, OutOfMemory, run_items
from .rows import Result, ResultKey, ResultRows, append_lines, key, name

# Options of a run that do not affect its results.
_BOOKKEEPING = (
    "seeds",
    "name",
    "out",
    "resume",
    "overwrite",
    "start_from",
    "save_seconds",
)


class Job(NamedTuple):
    """One program, with all its seeds.

    Attributes:
      task: name of the task in its rows.
      method: name of the method in its rows.
      shots: name in its rows for the number of training rows.
      options: options of the run.
      drawn: names of options that another seed has differently.
    """

    task: str
    method: str
    shots: str
    options: FuseOptions
    drawn: tuple[str, ...] = ()

    @property
    def keys(self) -> list[ResultKey]:
        """Keys of its rows: what draws nothing has one."""
        seeds = (
            self.options.seeds if self.options.entry.seeded else self.options.seeds[:1]
        )
        return [(self.task, self.method, self.shots, seed) for seed in seeds]


class _Failed(TypedDict):
    """A job that ran out of memory; the settings are those of `settings_of`."""

    task: str
    method: str
    shots: str
    seeds: list[int]
    config: dict[str, Any]
    error: str


def run_jobs(
    jobs: Iterable[Job],
    file: Path,
    run: Callable[[FuseOptions], RunResults],
    *,
    root: Path | None = None,
    retry_failed: bool = False,
    engine: EngineOptions = LOCAL,
) -> None:
    """Run the jobs whose rows are not in a file yet, and add their rows.

    A job that runs out of memory is added to `failed.jsonl` in the file's folder, and the others are run. Later calls
    leave it out, if it has the same seeds and settings.

    Args:
      jobs: jobs, in the order to run them.
      file: file of rows (see `report`).
      run: function that runs the options of a job, such as `lorafusion_jax.fuse`. Its folder is written on the node
        that runs it, and only this process writes rows.
      root: paths inside this folder are written relative to it, so that rows of two checkouts are alike.
      retry_failed: also run what ran out of memory before.
      engine: where the jobs run.

    Raises:
      ValueError: before anything is run: a method cannot be used here, or the file has rows of other settings; and at
        the end, if no job has a row because all ran out of memory.
    """
    todo = list(jobs)
    for job in todo:
        job.options.entry.check()
    results = ResultRows(file, key, kind=Result)
    job_by_name = {job[:3]: job for job in todo}
    job_by_key = {(*job[:3], seed): job for job in todo for seed in job.options.seeds}
    for row in results.rows():
        if job := job_by_key.get(key(row), job_by_name.get(key(row)[:3])):
            drawn = () if row["seed"] in job.options.seeds else job.drawn
            # Options that were added later have their defaults in older rows.
            default = FuseOptions(base="", task="", method=job.options.method)
            row_settings = _flat(options_to_json(default)) | _flat(row["config"])
            if changes := [
                f"{option} was {row_settings.get(option)}, is {value}"
                for option, value in _flat(settings_of(job.options, root)).items()
                if option not in drawn and row_settings.get(option) != value
            ]:
                raise ValueError(
                    f"{file}: {name(row)} was run with other settings ({'; '.join(changes)}): give another --out"
                )
    failures = file.with_name("failed.jsonl")
    failed = []
    if not retry_failed:
        lines = read_lines(failures, _Failed)
        failed = [dict(line) | {"error": ""} for line in lines]
    left_out = 0

    def measure(missing: Sequence[ResultKey]) -> Iterator[Mapping[str, Any]]:
        nonlocal left_out
        keys_left = set(missing)
        jobs_to_measure = [
            *dict.fromkeys(job_by_key[missing_key] for missing_key in missing)
        ]
        jobs_of_round = [
            job for job in jobs_to_measure if _failure(job, root) not in failed
        ]
        left_out = len(jobs_to_measure) - len(jobs_of_round)
        for job, rows in run_items(
            functools.partial(_rows, run, root),
            jobs_of_round,
            engine,
            check=functools.partial(_open, jobs_of_round),
            memory=lambda job: run_cost(job.options, "cpu").peak_bytes + PROCESS_BYTES,
        ):
            if isinstance(rows, OutOfMemory):
                append_lines(failures, [_failure(job, root) | {"error": rows.error}])
                left_out += 1
                print(
                    f"{', '.join(job[:3])}: out of memory ({rows.error})",
                    file=sys.stderr,
                    flush=True,
                )
            else:
                yield from (row for row in rows if key(row) in keys_left)

    results.fill(
        (job_key for job in todo for job_key in job.keys),
        measure,
        lambda row: f"{name(row)}: {row['exact_match']:.1f} %, {row['seconds']:.1f} s",
    )
    if left_out:
        text = f"{left_out} of {len(todo)} jobs ran out of memory ({failures}): --retry-failed runs them again"
        if not file.exists():
            raise ValueError(f"{text}, and no other job has a result")
        print(text, file=sys.stderr, flush=True)


def _failure(job: Job, root: Path | None) -> dict[str, Any]:
    """Return the line of a job that ran out of memory, without the error."""
    return {
        "task": job.task,
        "method": job.method,
        "shots": job.shots,
        "seeds": list(job.options.seeds),
        "config": settings_of(job.options, root),
        "error": "",
    }


def settings_of(options: FuseOptions, root: Path | None = None) -> dict[str, Any]:
    """Return, as JSON, all settings of a result other than its seed; paths inside the root are relative to it."""
    values = options_to_json(with_targets(options))
    if root is not None:
        values = json.loads(json.dumps(values).replace(f"{root}/", ""))
    return {name: value for name, value in values.items() if name not in _BOOKKEEPING}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, **settings["recipe"], "recipe": None}


def _open(jobs: Sequence[Job]) -> None:
    """Raise ValueError if a base or a pool of the jobs cannot be opened."""
    for base, pool in {(job.options.base, job.options.pool) for job in jobs}:
        _ = open_base(base).config
        if pool is not None:
            open_pool(pool)


def _rows(
    run: Callable[[FuseOptions], RunResults], root: Path | None, job: Job
) -> list[dict[str, Any]]:
    """Run a job and return its rows."""
    results = run(job.options)
    folder = RunFolder(run_path(job.options))
    config = folder.config()
    predictions = folder.predictions()
    shared = {
        "task": job.task,
        "method": job.method,
        "shots": job.shots,
        "trainable": results.trainable,
        "seconds": results.seconds["train"] / len(results.seeds),
        "config": settings_of(job.options, root),
        "data_sha256": config["task_sha256"],
        **{
            name: config["environment"][name]
            for name in ("versions", "device", "cores")
        },
    }
    rows = []
    for seed in results.seeds:
        marks: dict[str, str | None] = {}
        for field in ("correct", "option_correct"):
            right = [row[field] for row in predictions if row["seed"] == seed["seed"]]
            marks[field] = None
            if None not in right:
                marks[field] = "".join(str(int(bool(mark))) for mark in right)
        scores = {name: value for name, value in seed.items() if name != "modules"}
        rows.append(shared | marks | scores)
    return rows
