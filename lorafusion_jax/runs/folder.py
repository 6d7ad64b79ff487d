"""A run on disk: its options, its metrics and its results.

    runs/NAME/config.json         options, environment, modules by seed
    runs/NAME/metrics.jsonl       a line for each step and seed, and for each epoch and seed
    runs/NAME/checkpoints/        step_000123: the whole state, to resume from; private (see `io.store`)
    runs/NAME/final/              the trained parameters (see `io.store`)
    runs/NAME/predictions.jsonl   a line for each seed and test row
    runs/NAME/results.json        last of all, so a run that has it is complete

A folder is locked while a process writes to it. If a run has several processes, only the first one writes.
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, get_type_hints

import jax
import msgspec

from ..io import store
from ..io.digests import Digests
from ..methods import METHODS
from ..support import processes
from ..support.reading import FileError, decode_as, read_json, read_lines, show
from ..support.writing import (
    check_no_link,
    locked,
    remove_partial,
    write_text,
    writing,
)
from ..tasks import task_name
from ..training.mesh import SeedMode, to_host
from ..training.method import Params
from ..training.recipe import Recipe
from .options import FuseOptions, options_with, plain

FINAL = "training result"
_CONFIG = "config.json"
_METRICS = "metrics.jsonl"
_PREDICTIONS = "predictions.jsonl"
_RESULTS = "results.json"


class Environment(TypedDict):
    """Environment in which a run was begun."""

    seed_mode: SeedMode
    unroll: NotRequired[bool]  # the layers in training (`Architecture.unroll`)
    dtype: str
    device: str
    cores: int
    versions: dict[str, str]


class Folders(TypedDict, total=False):
    """Absolute paths of files that the options name by relative ones, which elsewhere may look like hub ids."""

    base: str
    pool: str
    task: str


class RunConfig(TypedDict):
    """Contents of `config.json`."""

    options: FuseOptions
    modules: list[list[str]]  # of each seed
    task_sha256: str
    trained_sha256: list[
        str
    ]  # of the inputs that any seed was trained or validated on (`Example.input_sha256`)
    max_new_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    environment: Environment
    digests: Digests
    folders: Folders


class SeedResults(TypedDict):
    """Scores of a seed in `results.json`."""

    seed: int
    exact_match: float | None  # None without test rows
    loss: float | None
    steps: int
    modules: list[str]
    option_accuracy: NotRequired[float | None]
    forward_rows: NotRequired[int]
    backward_rows: NotRequired[int]
    left_out: NotRequired[
        dict[str, float]
    ]  # share of the squared norm of a start that a LoRA's rank lacks, by site


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResults:
    """What a run achieved: the contents of `results.json`.

    Attributes:
      task: name of the task.
      method: name of the method.
      control: what replaces the pool, or "none".
      trainable: number of trained parameters of a seed.
      trainable_by_group: the same by group, such as coefficients and magnitudes.
      exact_match: mean over seeds, in percent; None without test rows.
      exact_match_std: standard deviation over seeds; None for one seed.
      seeds: scores, steps and modules of each seed.
      test_rows: number of test rows.
      test_sha256: digest of the test rows with all columns.
      seconds: time of training, of which runs that were trained together have equal shares, and of evaluation.
      environment: versions, devices and settings.
    """

    task: str
    method: str
    control: str
    trainable: int
    trainable_by_group: dict[str, int]
    exact_match: float | None
    exact_match_std: float | None
    seeds: list[SeedResults]
    test_rows: int
    test_sha256: str
    seconds: dict[str, float]
    environment: Environment


class Prediction(TypedDict):
    """A line of `predictions.jsonl`."""

    seed: int
    row: int
    input: str
    target: str
    prediction: str
    correct: bool
    option_correct: bool | None


class FinalSteps(TypedDict):
    """Metadata of the trained parameters: steps of each seed, and seconds of training."""

    steps: list[int]
    seconds: NotRequired[float]


class _Step(TypedDict):
    step: int


_typed_dict: Any = (
    TypedDict  # called with fields that are only known when a run is read
)


class RunFolder:
    """The files of one run. Writers hold its lock (`locked`)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.final = folder / "final"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out while this one lives, and remove files that a killed process left unfinished.

        Raises a ValueError if another process is writing to the run, or if a file in it is a link.
        """
        if not processes.first():
            yield
            return
        with locked(self.folder, "this run another --name"):
            for path in (self.folder / _METRICS, self.checkpoints):
                check_no_link(path)
            with writing(self.folder):
                remove_partial(self.checkpoints)
            yield

    def exists(self) -> bool:
        """Return whether a run was begun here."""
        return (self.folder / _CONFIG).is_file()

    def config(self) -> RunConfig:
        """Return the recorded configuration; FileError if the folder is not a run or the file is damaged or newer."""
        path = self.folder / _CONFIG
        raw = read_json(path, dict[str, Any], "a run")
        kind = _options_class(raw.get("options"), path)
        fields: Any = get_type_hints(RunConfig, include_extras=True) | {"options": kind}
        config: RunConfig = decode_as(raw, _typed_dict("RunConfig", fields), path)
        config["options"] = plain(config["options"])
        if len(config["modules"]) != len(config["options"].seeds):
            raise FileError(
                path,
                field="modules",
                got=f"of {len(config['modules'])} seeds",
                expected=f"of {len(config['options'].seeds)}, as in the options",
                fix="restore it from a copy",
            )
        return config

    def results(self) -> RunResults | None:
        """Return the results of all seeds, or None if the run is not complete."""
        path = self.folder / _RESULTS
        if not path.is_file():
            return None
        results: RunResults = read_json(
            path, RunResults, "a complete run", allow_unknown=True
        )
        seeds = [seed["seed"] for seed in results.seeds]
        seeds_of_run = [*self.config()["options"].seeds]
        if seeds not in (
            seeds_of_run,
            seeds_of_run[:1],
        ):  # one for all that answer alike
            raise FileError(
                path,
                field="seeds",
                got=str(seeds),
                expected=f"{seeds_of_run}, as in {_CONFIG}",
                fix="restore it from a copy",
            )
        return results

    def metrics(self) -> list[dict[str, Any]]:
        """Return all lines of the metrics, except a last line that a killed process left unfinished."""
        path = self.folder / _METRICS
        rows = read_lines(path)
        for number, row in enumerate(rows, start=1):
            decode_as(row, _Step, f"{path}, line {number}", allow_unknown=True)
        return rows

    def predictions(self) -> list[Prediction]:
        """Return the model's recorded answers to every row."""
        path = self.folder / _PREDICTIONS
        if not path.is_file():
            raise FileError(path, got="missing", fix="restore it from a copy")
        return read_lines(path, Prediction, allow_unknown=True)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the configuration of the run."""
        _write(
            self.folder / _CONFIG,
            json.dumps(msgspec.to_builtins(config, enc_hook=str), indent=1) + "\n",
        )

    def write_results(self, results: RunResults) -> None:
        """Write the results, which completes the run; a number that is not finite is null."""
        fields = _finite(dataclasses.asdict(results))
        _write(self.folder / _RESULTS, json.dumps(fields, indent=1) + "\n")

    def write_predictions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the model's answers to every row."""
        _write(
            self.folder / _PREDICTIONS, "".join(json.dumps(row) + "\n" for row in rows)
        )

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to the metrics; a number that is not finite is null."""
        lines = [json.dumps(_finite(row)) + "\n" for row in rows]
        if processes.first():
            with writing(self.folder), open(self.folder / _METRICS, "a") as file:
                file.write("".join(lines))

    def cut_metrics(self, step: int) -> None:
        """Remove lines after a step, and a line that a killed process left unfinished."""
        if (self.folder / _METRICS).is_file():
            lines = [
                json.dumps(row) + "\n" for row in self.metrics() if row["step"] <= step
            ]
            _write(self.folder / _METRICS, "".join(lines))


def run_path(options: FuseOptions) -> Path:
    """Return the folder of the run: OUT/NAME, by default OUT/TASK-METHOD, with -CONTROL and -DRAW after it if given."""
    task = task_name(options.task)
    control = "" if options.control == "none" else f"-{options.control}"
    control += f"-{options.control_draw}" if options.control_draw else ""
    return Path(options.out) / (options.name or f"{task}-{options.method}{control}")


def load_run(folder: str | Path) -> tuple[FuseOptions, dict[str, Any], RunConfig]:
    """Return the options, the trained parameters (leaves with an axis of seeds) and the config of a run."""
    run = RunFolder(Path(folder))
    config = run.config()
    options = _located(config)
    if options.entry.learns == "untrained":
        return options, {}, config
    if not run.final.is_dir():
        raise ValueError(
            f"{folder} has not been trained to its end: resume it with --resume"
        )
    params, _ = store.load(run.final, FINAL, FinalSteps)
    if wrong := [
        p.shape for p in jax.tree.leaves(params) if p.shape[:1] != (len(options.seeds),)
    ]:
        raise FileError(
            run.final,
            got=f"has an array of shape {wrong[0]}",
            expected=f"an axis of {len(options.seeds)} seeds",
            fix="restore it from a copy, or train again",
        )
    return options, jax.device_put(params), config


def load_seed(
    folder: Path, seed: int | None
) -> tuple[FuseOptions, Params, RunConfig, int]:
    """Return a run's options, the parameters of one seed (by default its first), its config, and the seed's place."""
    options, params, config = load_run(folder)
    place = seed_place(folder, options.seeds, seed)
    return (
        options,
        jax.device_put(jax.tree.map(lambda p: p[place], to_host(params))),
        config,
        place,
    )


def check_answers(folder: Path, options: FuseOptions) -> None:
    """Raise a ValueError for a run whose method needs rows of the task to answer."""
    if options.entry.answers != "model":
        raise ValueError(
            f"{folder} is of {options.method}, which needs rows of its task: use `lorafusion evaluate`"
        )


def seed_place(folder: Path, seeds: tuple[int, ...], seed: int | None) -> int:
    """Return the place of one of a run's seeds (by default its first) among them; raises a ValueError for others."""
    if seed is not None and seed not in seeds:
        raise ValueError(
            f"{folder} has no seed {seed}: it has {', '.join(map(str, seeds))}; choose one"
        )
    return 0 if seed is None else seeds.index(seed)


def _located(config: RunConfig) -> FuseOptions:
    """Return the options of a run with absolute paths instead of relative ones."""
    options = config["options"]
    for name, path in config["folders"].items():
        source = Path(getattr(options, name) or "").expanduser()
        # In a project that was moved as a whole, only the relative paths lead to the files.
        if not source.is_absolute() and (
            Path(str(path)).exists() or not source.exists()
        ):
            options = dataclasses.replace(options, **{name: path})
    return options


def _options_class(raw: Any, where: Path) -> type[FuseOptions]:
    """Return the class of the options in JSON, by their method."""
    method = raw.get("method", FuseOptions.method) if isinstance(raw, dict) else None
    if isinstance(method, str) and method not in METHODS:
        raise FileError(
            where,
            field="options.method",
            got=repr(method),
            expected=f"one of {', '.join(METHODS)}",
            fix="register it first, or restore the file from a copy",
        )
    return options_with(METHODS[method].recipe if isinstance(method, str) else Recipe)


def note(text: str) -> None:
    """Print a note on stderr, in the first process."""
    if processes.first():
        show(text, file=sys.stderr)


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
