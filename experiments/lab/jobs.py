"""A matrix of runs, such as tasks by methods: every result is a row of one JSONL file, and none is run twice.

A job that runs out of memory has no result. It is a line of `failed.jsonl` next to that file, and is not tried again.
"""

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax

from lorafusion_jax import FuseOptions
from lorafusion_jax.methods import find
from lorafusion_jax.parts import RunFolder, options_to_json, printable, read_lines, read_options, run_path, with_targets

from .cells import append_lines
from .rows import append_rows, done, read_rows

# Options of a run that do not affect its results.
_BOOKKEEPING = (
    *("seeds", "name", "out", "resume", "start_from", "save_seconds", "profile"),
    *("coordinator", "processes", "process"),
)
_LONGEST_ERROR = 500


class Job(NamedTuple):
    """One program of a matrix, with all its seeds.

    Attributes:
      task: name of the task in its rows.
      method: name of the method in its rows.
      league: name in its rows for the number of training rows.
      options: options of the run.
      drawn: names of options that another seed has differently.
    """

    task: str
    method: str
    league: str
    options: FuseOptions
    drawn: tuple[str, ...] = ()


class _Failed(TypedDict):
    """A job that ran out of memory; the settings are those of `settings_of`."""

    task: str
    method: str
    league: str
    seeds: list[int]
    config: dict[str, Any]
    error: str


def run_jobs(
    jobs: Iterable[Job],
    file: Path,
    run: Callable[[FuseOptions], Mapping[str, Any]],
    *,
    root: Path | None = None,
    retry_failed: bool = False,
) -> None:
    """Run the jobs whose rows are not in a file yet, and add their rows.

    A job that runs out of memory is added to `failed.jsonl` in the file's folder, and the others are run. Later calls
    leave it out, if it has the same seeds and settings.

    Args:
      jobs: jobs, in the order to run them.
      file: file of rows (see `report`).
      run: function that runs the options of a job, such as `lorafusion_jax.fuse`.
      root: paths inside this folder are written relative to it, so that rows of two checkouts are alike.
      retry_failed: also run what ran out of memory before.

    Raises:
      ValueError: before anything is run: a method cannot be used here, or the file has rows of other settings; and at
        the end, if no job has a row because all ran out of memory.
    """
    todo = list(jobs)
    for job in todo:
        find(job.options.method).check()
    rows = read_rows(file) if file.exists() else []
    have = done(rows)
    of_any = {job[:3]: job for job in todo}
    of_seed = {(*job[:3], seed): job for job in todo for seed in job.options.seeds}
    for row in rows:
        of, seed = (row["task"], row["method"], row["league"]), row["seed"]
        if job := of_seed.get((*of, seed), of_any.get(of)):
            drawn = () if seed in job.options.seeds else job.drawn
            where = f"{file}: {', '.join(of)}, seed {seed}"
            check_same(row["config"], job.options, where, root=root, drawn=drawn)
    failures = file.with_name("failed.jsonl")
    before = [] if retry_failed or not failures.exists() else read_lines(failures, _Failed)
    failed = [dict(failure) | {"error": ""} for failure in before]
    began = time.perf_counter()
    left_out = 0
    for number, job in enumerate(todo, start=1):
        seeds = job.options.seeds if find(job.options.method).seeded else job.options.seeds[:1]
        if {(*job[:3], seed) for seed in seeds} <= have:
            continue
        of = ", ".join(job[:3])
        failure = _failure(job, root)
        if failure in failed:
            left_out += 1
            continue
        try:
            results = run(job.options)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            failure["error"] = printable(str(error).partition("\n")[0][:_LONGEST_ERROR]) or type(error).__name__
            append_lines(failures, [json.dumps(failure).encode() + b"\n"])
            left_out += 1
            print(f"[{number}/{len(todo)}] {of}: out of memory ({failure['error']})", file=sys.stderr, flush=True)
        else:
            append_rows(file, [row for row in _rows(job, results, root) if (*job[:3], row["seed"]) not in have])
            minutes = (time.perf_counter() - began) / 60
            text = f"{of}: {results['exact_match']:.1f} %, {minutes:.1f} min"
            print(f"[{number}/{len(todo)}] {text}", file=sys.stderr, flush=True)
        gc.collect()  # the error's traceback held the arrays of the run
    if left_out:
        text = f"{left_out} of {len(todo)} jobs ran out of memory ({failures}): --retry-failed runs them again"
        if not file.exists():
            raise ValueError(f"{text}, and no other job has a result")
        print(text, file=sys.stderr, flush=True)


def _failure(job: Job, root: Path | None) -> dict[str, Any]:
    """Return the line of a job that ran out of memory, without the error."""
    shared = {"seeds": list(job.options.seeds), "config": settings_of(job.options, root), "error": ""}
    return {"task": job.task, "method": job.method, "league": job.league, **shared}


def settings_of(options: FuseOptions, root: Path | None = None) -> dict[str, Any]:
    """Return, as JSON, all settings of a result other than its seed; paths inside the root are relative to it."""
    values = options_to_json(with_targets(options))
    if root is not None:
        values = json.loads(json.dumps(values).replace(f"{root}/", ""))
    return {name: value for name, value in values.items() if name not in _BOOKKEEPING}


def check_same(
    was: Mapping[str, Any],
    now: FuseOptions,
    where: str,
    *,
    root: Path | None = None,
    drawn: Sequence[str] = (),
    **more: Any,
) -> None:
    """Raise ValueError if a row was made with other settings than those of a run.

    Args:
      was: the row's configuration.
      now: the options of the run.
      where: the row, for the message.
      root: as in `settings_of`.
      drawn: options that may differ, as each seed draws them.
      more: settings of a row other than its options.
    """
    known = {field.name for field in dataclasses.fields(FuseOptions)}
    before = read_options({name: value for name, value in was.items() if name in known}, where)
    old, new = (values | values.pop("recipe") for values in (settings_of(options, root) for options in (before, now)))
    old, new = old | {name: was.get(name) for name in more}, new | more
    if different := [name for name in new if name not in drawn and old.get(name) != new[name]]:
        changes = "; ".join(f"{name} was {old.get(name)}, is {new[name]}" for name in different)
        raise ValueError(f"{where} was run with other settings ({changes}): give another --out")


def _rows(job: Job, results: Mapping[str, Any], root: Path | None) -> Iterator[dict[str, Any]]:
    run = RunFolder(run_path(job.options))
    config, predictions = run.config(), run.predictions()
    shared = {
        "task": job.task,
        "method": job.method,
        "league": job.league,
        "trainable": results["trainable"],
        "seconds": results["seconds"]["train"] / len(results["seeds"]),
        "config": settings_of(job.options, root),
        "data_sha256": config["task_sha256"],
        **{name: config["environment"][name] for name in ("versions", "device", "cores")},
    }
    for seed in results["seeds"]:
        of_seed = [row for row in predictions if row["seed"] == seed["seed"]]
        scored = all(row["option_correct"] is not None for row in of_seed)
        yield shared | {
            "correct": "".join(str(int(row["correct"])) for row in of_seed),
            "option_correct": "".join(str(int(row["option_correct"] or False)) for row in of_seed) if scored else None,
            **{name: value for name, value in seed.items() if name != "modules"},
        }
