"""Jobs, and rows of results: JSON lines of a file that only ever grows, so an interrupted command continues.

A process that is killed while it appends leaves a last line without its end. Readers ignore that line, and the next
append removes it. Rows of jobs have a schema, and one for each task, method, number of shots and seed. A job that runs
out of memory has no result. It is a line of `failed.jsonl` next to that file, and is not tried again.
"""

import dataclasses
import fcntl
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypedDict, TypeVar

import msgspec

from ..estimates.plan import PROCESS_BYTES, run_cost
from ..io.hf import open_base
from ..io.pool import open_pool
from ..runs.folder import RunFolder, RunResults, run_path
from ..runs.options import FuseOptions, options_to_json
from ..runs.start import with_targets
from ..support.reading import FileError, decode_as, is_object, read_lines
from ..support.writing import check_no_link, writing
from .engines import LOCAL, EngineOptions, OutOfMemory, run_items

# Options of a run that do not affect its results.
_BOOKKEEPING = (
    *("seeds", "name", "out", "resume", "overwrite", "start_from", "save_seconds"),
)

Row = dict[str, Any]
# Rows to learn from: 95 and 5 for validation, or LoraHub's 5.
Shots = Literal["95+5", "5"]
ResultKey = tuple[str, str, str, int]
Key = TypeVar("Key")

_Name = Annotated[str, msgspec.Meta(pattern=r"\S", description="a name")]
_Count = Annotated[int, msgspec.Meta(ge=0, description="a count")]
_Marks = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[01]+\Z", description="a 0 or 1 for each of at least one test row"
    ),
]
_Digest = Annotated[
    str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z", description="64 hexadecimal digits")
]


class Result(TypedDict):
    """The result of one method on one task with one seed; `correct` has a character for every test row, in order."""

    task: _Name
    method: _Name
    shots: Shots
    seed: _Count
    exact_match: float  # percent, of `correct`
    option_accuracy: float | None  # percent, of `option_correct`
    loss: float | None  # null also where it was not finite
    correct: _Marks
    option_correct: _Marks | None
    trainable: _Count
    steps: _Count
    forward_rows: _Count  # rows passed forward while adapting
    backward_rows: _Count
    seconds: Annotated[float, msgspec.Meta(ge=0, description="seconds")]
    config: dict[str, Any]
    data_sha256: _Digest  # of the task's rows
    versions: dict[str, str]
    device: _Name
    cores: _Count


def key(row: Mapping[str, Any]) -> tuple[str, str, str, int]:
    """Return task, method, shots and seed of a row, which identify it."""
    return row["task"], row["method"], row["shots"], row["seed"]


def name(row: Mapping[str, Any]) -> str:
    """Return the same in words."""
    return f"{row['task']}, {row['method']}, {row['shots']} shots, seed {row['seed']}"


def append_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add objects to a file of JSON lines, which is made if it does not exist, and return when they are on disk.

    They replace a last line that was cut off. Processes that append at the same time wait for each other.

    Raises:
      ValueError: the file is a link.
      WriteError: the disk is full, read-only or gone, or has no locks.
    """
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        check_no_link(file)
        with open(file, "a+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            opened.seek(0)
            last = opened.read().rpartition(b"\n")[
                2
            ]  # empty if the last line has its end
            if is_object(last):
                lines = [b"\n", *lines]
            elif last:
                opened.truncate(os.fstat(opened.fileno()).st_size - len(last))
            opened.write(b"".join(lines))
            opened.flush()
            os.fsync(opened.fileno())


@dataclasses.dataclass(frozen=True)
class ResultRows(Generic[Key]):
    """Measured results of an experiment, in a file.

    Attributes:
      file: JSON lines, one for each result, which only ever grow.
      key_of: function that returns the key of a row.
      common: settings that all rows of the file have.
      read: function that returns the rows of the file.
      append: function that adds rows to the file.
    """

    file: Path
    key_of: Callable[[Row], Key]
    common: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Path], list[Any]] = read_lines
    append: Callable[[Path, Sequence[Mapping[str, Any]]], None] = append_lines

    def rows(self) -> list[Row]:
        """Return the rows of the file, none if it does not exist.

        Raises:
          ValueError: a line is not JSON, or a row has other settings.
        """
        rows = self.read(self.file) if self.file.exists() else []
        for row in rows:
            others = {
                name: value
                for name, value in self.common.items()
                if row.get(name) != value
            }
            if other := [
                f"{name} was {row.get(name)}, is {value}"
                for name, value in others.items()
            ]:
                raise ValueError(
                    f"{self.file} holds other rows ({'; '.join(other)}): give another --out"
                )
        return rows

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Return the keys without a row, each once, in their order."""
        have = {self.key_of(row) for row in self.rows()}
        return [key for key in dict.fromkeys(keys) if key not in have]

    def fill(
        self,
        keys: Iterable[Key],
        measure: Callable[[list[Key]], Iterable[Mapping[str, Any]]],
        show: Callable[[Row], str],
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Measure the missing results, and append their rows one by one.

        Args:
          keys: keys of the results, in the order in which to measure them.
          measure: function that yields the rows of the missing results, which it may group.
          show: function that returns a row as a line of the progress.
          after: function that is called after each row.
        """
        if not (missing := self.missing(keys)):
            return
        for number, row in enumerate(measure(missing), start=1):
            row = {**self.common, **row}
            self.append(self.file, [row])
            print(f"[{number}/{len(missing)}] {show(row)}", file=sys.stderr, flush=True)
            after()


def read_rows(path: Path) -> list[Result]:
    """Return the rows of a file, without a last line that was cut off; ValueError for a line that is not a row."""
    if not path.exists():
        raise FileError(path, got="missing", fix="restore it from a copy")
    return [
        _checked(row, f"{path}, line {n}")
        for n, row in enumerate(read_lines(path), start=1)
    ]


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a file, which is made if it does not exist, and return when they are on disk.

    Processes that append at the same time wait for each other. Only a last line that was cut off is removed. A loss
    that is not finite is written as null.

    Raises:
      ValueError: a row lacks a key or has a wrong value, or the file is a link; nothing is written.
      WriteError: the disk is full, read-only or gone, or has no locks.
    """
    append_lines(
        path,
        [
            _whole(row, f"row {n} of {len(rows)} to append")
            for n, row in enumerate(rows, start=1)
        ],
    )


def merge(files: Sequence[Path]) -> list[Result]:
    """Return the rows of several files; a row that occurs again, identical, counts once.

    Rows of one task with different data, or two different results of one key, are a ValueError.
    """
    merged: dict[ResultKey, tuple[Result, Path]] = {}
    hashes: dict[str, tuple[str, Path]] = {}
    for path in files:
        for row in read_rows(path):
            first, origin = hashes.setdefault(row["task"], (row["data_sha256"], path))
            if first != row["data_sha256"]:
                raise ValueError(
                    f"{row['task']} has different data in {origin} (sha256 {first}) and {path} (sha256 "
                    f"{row['data_sha256']}): their results cannot be compared; leave one out or run it again"
                )
            kept, origin = merged.setdefault(key(row), (row, path))
            if kept != row:
                differing = ", ".join(
                    field
                    for field in Result.__annotations__
                    if kept[field] != row[field]
                )
                raise ValueError(
                    f"{name(row)} has two results, in {origin} and {path}, which differ in {differing}: remove one"
                )
    return [row for row, _ in merged.values()]


def _whole(row: Mapping[str, Any], where: str) -> Result:
    loss = row.get("loss")
    if isinstance(loss, float) and not math.isfinite(loss):
        row = {**row, "loss": None}
    checked = _checked(dict(row), where)
    try:
        json.dumps(checked, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}, {name(row)}: JSON cannot hold it: {error}"
        ) from error
    return checked


def _checked(row: Any, where: str) -> Result:
    return decode_as(
        row,
        Result,
        where,
        fix="fix the row; what describes the run belongs into config",
    )


def print_plan(costs: Iterable[tuple[str, float]], note: str = "") -> None:
    """Print the number of missing results and their CPU time by label, and the time of all.

    Args:
      costs: label and CPU seconds of each result.
      note: printed after the total.
    """
    by_label: dict[str, list[float]] = {}
    for label, seconds in costs:
        by_label.setdefault(label, []).append(seconds)
    for label, seconds in by_label.items():
        print(f"{label}: {len(seconds)} cells, {sum(seconds) / 60:.1f} minutes")
    count = sum(map(len, by_label.values()))
    total = sum(map(sum, by_label.values()))
    print(f"{count} cells, {total / 60:.0f} CPU minutes{note}")


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
    results = ResultRows(
        file, key, read=read_rows, append=append_rows
    )  # whose rows are checked
    job_by_name = {job[:3]: job for job in todo}
    job_by_key = {(*job[:3], seed): job for job in todo for seed in job.options.seeds}
    for row in results.rows():
        if job := job_by_key.get(key(row), job_by_name.get(key(row)[:3])):
            drawn = () if row["seed"] in job.options.seeds else job.drawn
            _check_same(
                row["config"],
                job.options,
                f"{file}: {name(row)}",
                root=root,
                drawn=drawn,
            )
    failures = file.with_name("failed.jsonl")
    before = [] if retry_failed else read_lines(failures, _Failed)
    failed = [dict(failure) | {"error": ""} for failure in before]
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
            memory=_memory,
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
    shared = {
        "seeds": list(job.options.seeds),
        "config": settings_of(job.options, root),
        "error": "",
    }
    return {"task": job.task, "method": job.method, "shots": job.shots, **shared}


def settings_of(options: FuseOptions, root: Path | None = None) -> dict[str, Any]:
    """Return, as JSON, all settings of a result other than its seed; paths inside the root are relative to it."""
    values = options_to_json(with_targets(options))
    if root is not None:
        values = json.loads(json.dumps(values).replace(f"{root}/", ""))
    return {name: value for name, value in values.items() if name not in _BOOKKEEPING}


def _check_same(
    was: Mapping[str, Any],
    now: FuseOptions,
    where: str,
    *,
    root: Path | None,
    drawn: Sequence[str],
) -> None:
    """Raise ValueError if a row's configuration differs from a run's options, other than those drawn."""
    new = _flat(settings_of(now, root))
    # Options that were added later have their defaults in older rows.
    defaults = options_to_json(FuseOptions(base="", task="", method=now.method))
    old = _flat(defaults) | _flat(was)
    if different := [
        name for name in new if name not in drawn and old.get(name) != new[name]
    ]:
        changes = "; ".join(
            f"{name} was {old.get(name)}, is {new[name]}" for name in different
        )
        raise ValueError(
            f"{where} was run with other settings ({changes}): give another --out"
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, **settings["recipe"], "recipe": None}


def _open(jobs: Sequence[Job]) -> None:
    """Raise ValueError if a base or a pool of the jobs cannot be opened."""
    for base, pool in {(job.options.base, job.options.pool) for job in jobs}:
        _ = open_base(base).config
        if pool is not None:
            open_pool(pool)


def _memory(job: Job) -> int:
    """Return the bytes of memory that a job needs on a CPU."""
    return run_cost(job.options, "cpu").peak_bytes + PROCESS_BYTES


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
        seed_predictions = [row for row in predictions if row["seed"] == seed["seed"]]
        scored = all(row["option_correct"] is not None for row in seed_predictions)
        scores = {
            "correct": "".join(str(int(row["correct"])) for row in seed_predictions),
            "option_correct": "".join(
                str(int(row["option_correct"] or False)) for row in seed_predictions
            )
            if scored
            else None,
            **{name: value for name, value in seed.items() if name != "modules"},
        }
        rows.append(shared | scores)
    return rows
