"""Options of a run: the command line, the saved configuration, and the presets."""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tyro

from ..loading.spec import LoadOptions
from ..methods.lora import is_warm
from ..support.checks import at_least, flags_given
from ..support.options import (
    AgeOptions,
    DrawnChipsOptions,
    EvaluatedRowsOptions,
    MeshOptions,
    RowOptions,
    TrainRowsOptions,
)
from ..tasks import Task, load_task
from ..training.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChipsOptions(DrawnChipsOptions):
    """Simulated chips, or none.

    Attributes:
      crossbar: run on simulated arrays: a file that `lorafusion crossbar program` wrote, a folder that
        `prepare` wrote, a preset (ideal, isaac, puma, raella, neurram, aihwkit, crosssim), or a .yaml or .json file;
        by default digitally.
      norm: the magnitudes' norms are those of the `ideal` weights, or of the weights as `programmed`, read back.
      restore: digital corrections of the chips: a folder that `lorafusion restore` wrote; by default none.
    """

    crossbar: str | None = None
    norm: Literal["ideal", "programmed"] = "ideal"
    restore: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChipOptions(AgeOptions, ChipsOptions):
    """A simulated chip, or none.

    Attributes:
      chip: number of the chip.
    """

    chip: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnArrays(ChipOptions):
    """The chip that a run is evaluated on, and those that it is trained on.

    Attributes:
      train_chip: arrays in training: `chip` for the one of the evaluation, calibrated; `fresh` for another at every
        step, which gives a fusion that is robust on any chip; `both` in turn; `none` for only the bits of cells and
        converters.
    """

    train_chip: Literal["chip", "fresh", "both", "none"] = "fresh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseOptions(
    MeshOptions, EvaluatedRowsOptions, TrainRowsOptions, RowOptions, LoadOptions
):
    """Fuse a pool of LoRA modules for a new task, and evaluate it by generation.

    Attributes:
      test_rows: evaluate on the first rows of the test set only; 0 evaluates nothing, and trains on all rows of a file.
      task: a JSONL file or a folder of them, a JSON list, a BIG-Bench Hard file, a `datasets` folder or hub id.
      name: name of the run, which is written to OUT/NAME; by default TASK-METHOD, followed by a
        control and its draw.
      out: folder of runs.
      arrays: simulated arrays; by default the run is digital.
      distributed: this process is one of several, which Slurm, Open MPI or GKE started, or which are on a TPU slice;
        --mesh covers all their devices.
      resume: continue a run that was interrupted.
      overwrite: replace a run in the same folder, once this one is complete.
      start_from: start from the saved fusion of another run (same base, modules, seeds and method), or from weights of
        modules: a folder that `lorafusion merge` wrote, or the JSON file of its --weights-file. The methods lora and
        dora also start from a run of another method, or from a PEFT adapter, at their own rank.
      save_seconds: time between checkpoints, which are written at the end of an epoch.
    """

    task: str
    name: str | None = None
    out: Path = Path("runs")
    arrays: Annotated[OnArrays, tyro.conf.arg(name="")] = OnArrays()
    distributed: bool = False
    resume: bool = False
    overwrite: bool = False
    start_from: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    save_seconds: float = 30.0

    def check(self) -> None:
        super().check()
        at_least(0, train_rows=self.train_rows, test_rows=self.test_rows)
        at_least(1, eval_batch=self.eval_batch)
        for name, value in (vars(self) | vars(self.recipe)).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{name} is {value}: give a finite number, because config.json cannot hold others"
                )
        if self.name is not None and (
            not Path(self.name).name or ".." in Path(self.name).parts
        ):
            raise ValueError(
                f"--name {self.name!r} is not the name of a folder: give one such as snarks-fusion"
            )
        if self.arrays.crossbar is None:
            check_digital(self.arrays, OnArrays.__dataclass_fields__)
        self._check_start()
        self._check_devices()

    def _check_start(self) -> None:
        if is_warm(self.recipe) and self.pool is None:
            raise ValueError("--warm-start starts from a pool: give it with --pool")
        if is_warm(self.recipe) and self.start_from:
            raise ValueError("--warm-start makes the start: leave it out, or --from")
        if self.start_from and self.entry.learns != "trained":
            raise ValueError(
                f"the method {self.method} starts from no run: leave out --from"
            )
        prunes = {"coefficients", "magnitudes"} <= set(self.entry.groups)
        if self.recipe.optimisation(1).prune and not prunes:
            raise ValueError(
                f"the method {self.method} does not prune: only a fusion with magnitudes does. Leave out --prune"
            )

    def _check_devices(self) -> None:
        if self.mesh is not None and self.entry.learns == "untrained":
            raise ValueError(
                f"{self.method} trains no seeds to share out over devices: leave out --mesh"
            )
        if not self.distributed:
            return
        if self.arrays.crossbar is not None:
            raise ValueError(
                "a run on simulated arrays is of one process: leave out --distributed"
            )
        if self.overwrite:
            raise ValueError(
                "--overwrite is for a run of one process: leave out --distributed"
            )
        if self.mesh is None:
            raise ValueError(
                "--distributed shares a run out over devices: give a layout with --mesh"
            )


@functools.cache
def options_with(recipe: type[Recipe]) -> type[FuseOptions]:
    """Return the options of runs with recipes of a class, whose fields are options of the command line too."""
    common = {
        field.name
        for part in (FuseOptions, OnArrays)
        for field in dataclasses.fields(part)
    }
    if taken := sorted(common & {field.name for field in dataclasses.fields(recipe)}):
        raise ValueError(
            f"{recipe.__name__} has a field {taken[0]}, which is an option of every run: rename the field"
        )
    shown = Annotated[recipe, tyro.conf.arg(name="")]
    recipe_field: Any = ("recipe", shown, dataclasses.field(default=recipe()))
    return dataclasses.make_dataclass(
        "FuseOptions", [recipe_field], bases=(FuseOptions,), frozen=True, kw_only=True
    )


def check_digital(options: Any, chip_fields: Iterable[str]) -> None:
    """Raise ValueError for options of chips, by their names, that are given without any chips."""
    if flags := flags_given(options, chip_fields):
        raise ValueError(
            f"{flags}: only for simulated chips: name them with --crossbar, or leave it out"
        )


def options_to_json(options: FuseOptions) -> dict[str, Any]:
    """Return the options as JSON values."""
    return msgspec.json.decode(msgspec.json.encode(options, enc_hook=str))


def plain(options: FuseOptions) -> FuseOptions:
    """Return options of the class `FuseOptions` itself, with all fields set.

    Options that msgspec reads leave defaults to their classes, and do not equal others with the same values.
    """
    values = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(FuseOptions)
    }
    parts = {name: dataclasses.replace(values[name]) for name in ("recipe", "arrays")}
    return FuseOptions(**values | parts)


def read_task(options: FuseOptions, need: Collection[Literal["train", "test"]]) -> Task:
    """Return the task of a run, which must have rows in the parts `need`; raises the errors of `load_task`."""
    return load_task(
        options.task,
        **row_format(options),
        train_rows=None if options.test_rows == 0 else options.train_rows,
        need=need,
    )


def row_format(options: FuseOptions) -> dict[str, Any]:
    """Return the arguments of `load_task` that turn rows into texts."""
    return {
        name: getattr(options, name) for name in ("prompt", "input", "target", "chat")
    }
