"""`lorafusion forecast`: whether a pool is worth fusing for a task, before anything is trained."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..io.hf import open_base
from ..loading.model import LoadedModel, load_model
from ..methods.fusion import CoefficientsRecipe
from ..support.checks import at_least
from ..tasks import Task, encode, eval_batches, load_task
from ..tasks.protocol import Protocol
from ..training.problem import Problem
from .advantage import FEWEST, WORTH, Case, Model, Prediction, fit, packaged
from .descent import Descent, check_sum, descent_of, with_copies
from .folder import RunFolder
from .options import FuseOptions, row_format
from .prepare import check, own_task, tasks_of_seeds
from .run import load_run

_KEY = 0  # of the rotated copies
_ALIKE = ("recipe", "seeds", "test_rows", "dtype", "load_in", "arrays")  # options of runs whose losses are compared
_CALIBRATE = "give finished runs of a few tasks, with the pool and with `fuse --control rotated`, to --calibrate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForecastOptions:
    """Forecast whether a pool is worth fusing for a task, before anything is trained.

    One backward pass over the training rows, at zero coefficients, gives the gradient norm of each module (`descent`).
    Copies of the modules with rotated singular vectors show that of modules that learned nothing.

    Examples:
      lorafusion forecast --base examples/small/base --pool examples/small/adapters --task examples/small/tasks/odd_dash
      lorafusion forecast --base base --pool pool --task task --train-rows 20 --plot norms.png
      lorafusion forecast --base base --pool pool --task new --calibrate runs/a runs/a-rotated runs/b runs/b-rotated \
runs/c runs/c-rotated

    Attributes:
      base: the base model: a Hugging Face folder, a hub id (owner/name, owner/name@revision) or a GGUF file.
      pool: a converted pool, or a folder of PEFT adapter folders.
      task: the task, as in `lorafusion fuse`; only its training rows are used.
      calibrate: finished runs of the same base on three or more other tasks, each with the pool and with
        `--control rotated`; a base that the forecast was not fitted on needs them.
      draws: number of rotated copies.
      prompt: template of the model's input, with {input} or other columns of the task's rows.
      input: column of a row's input, if it is not input or context.
      target: column of a row's answer, if it is not target, completion or output.
      chat: put the input into the model's own chat template.
      train_rows: at most this many rows are used, those of the first seed of `lorafusion fuse`.
      plot: PNG file to draw the modules in, by gradient norm.
      json: write everything to this file.
    """

    base: str
    pool: str
    task: str
    calibrate: tuple[Path, ...] = ()
    draws: int = 3
    prompt: str | None = None
    input: str | None = None
    target: str | None = None
    chat: bool = False
    train_rows: int = 100
    plot: Path | None = None
    json: Path | None = None


class Forecast(NamedTuple):
    """A forecast, and the descent that it rests on.

    Attributes:
      task: name of the task.
      modules: names of the modules.
      descent: descent of the modules and of their rotated copies.
      prediction: the pool's advantage; None if it cannot be predicted.
      unknown: reason that it cannot be predicted, and the remedy; empty if it can.
    """

    task: str
    modules: tuple[str, ...]
    descent: Descent
    prediction: Prediction | None
    unknown: str

    @property
    def verdict(self) -> str:
        """One sentence: worth it, not worth it, or cannot tell."""
        if self.prediction is None:
            return f"Cannot tell: {self.unknown}."
        low, high, least = self.prediction.low, self.prediction.high, f"{WORTH} nats"
        if self.prediction.verdict == "worth it":
            return f"Worth it: the advantage is probably more than {low:.2f} nats."
        if self.prediction.verdict == "not worth it":
            return f"Not worth it: the advantage is probably less than {least}."
        return f"Cannot tell: the advantage may be below {least} or up to {high:.2f} nats."


def forecast(options: ForecastOptions) -> Forecast:
    """Return the forecast for a task, and the descent of the pool's modules on its training rows.

    Raises:
      ValueError: before anything is traced: options or files that cannot be used, runs for the calibration
        that are not complete, not in pairs, of other bases or of fewer than three tasks.
    """
    at_least(1, draws=options.draws)
    own = _ranking(options)
    check(own)
    digest = open_base(options.base).digest
    pairs = _pairs(options.calibrate, digest)
    measured = _Measured(options.draws)
    of_task, task, modules = measured.on(own)
    if any(run.task_sha256 == task.sha256 for run, _ in pairs):
        raise ValueError(f"{task.name} is a task of the calibration, so its advantage is known: leave out its runs")
    model, unknown = _model(digest, [measured.case(*pair) for pair in pairs])
    if model is not None and not model.rows[0] / 2 <= of_task.rows <= model.rows[1] * 2:
        seen = " to ".join(map(str, dict.fromkeys(model.rows)))
        unknown = (
            f"the forecast was fitted on tasks of {seen} training rows, and there are {of_task.rows}: {_CALIBRATE}"
        )
        model = None
    prediction = model and model.predict(of_task.log_ratio, of_task.loss, of_task.rows)
    return Forecast(task.name, modules, of_task, prediction, "" if model is not None else unknown)


class _Run(NamedTuple):
    """A finished run."""

    folder: Path
    task: str
    task_sha256: str
    options: FuseOptions
    modules: list[list[str]]
    loss: float  # mean of the seeds, nats per answer token


class _Measured:
    """Descents on several tasks; the model, each pool and its rotated copies are loaded once."""

    def __init__(self, draws: int):
        self.draws = draws
        self.loaded: dict[tuple[str, str | None, bool], tuple[LoadedModel, list[Problem]]] = {}

    def on(self, options: FuseOptions) -> tuple[Descent, Task, tuple[str, ...]]:
        """Return the descent on the rows of a ranking, the task and the modules; ValueError if the descent is zero."""
        task = load_task(options.task, **row_format(options), train_rows=options.train_rows, need=("train",))
        if (key := (options.base, options.pool, options.chat)) not in self.loaded:
            model = load_model(options)
            alone = model.problem.replace(index=model.problem.index[0])
            self.loaded[key] = model, with_copies(alone, jax.random.key(_KEY), self.draws)
        model, problems = self.loaded[key]
        (own,) = tasks_of_seeds(task, options)
        rows = encode(model.tokenizer, own.train, model.text_format)
        batches = eval_batches(rows, options.recipe.batch_size, pad_id=model.tokenizer.pad_token_id)
        measured = descent_of(problems, [batch for _, batch in batches])
        if not np.any(measured.modules):
            raise ValueError(f"no module of {options.pool} has an effect on {task.name}: give trained adapters")
        return measured, task, model.modules[0]

    def case(self, run: _Run, advantage: float) -> Case:
        """Return the features of the task of a run with the pool, whose advantage is known."""
        measured, _, _ = self.on(_ranking(run.options, run.options.seeds[0], run.options.recipe.protocol))
        return Case(
            task=run.task, log_ratio=measured.log_ratio, loss=measured.loss, rows=measured.rows, advantage=advantage
        )


def _ranking(options: Any, seed: int = FuseOptions.seeds[0], protocol: Protocol = "default") -> FuseOptions:
    """Return the options of a run that would rank all modules of a pool on the rows of a seed."""
    values = {name: getattr(options, name) for name in ("base", "pool", "task", "prompt", "input", "target", "chat")}
    ranks = CoefficientsRecipe(choose="gradient", modules=1, protocol=protocol)
    rows = options.train_rows
    return FuseOptions(**values, seeds=(seed,), train_rows=rows, method="coefficients", recipe=ranks)


def _pairs(folders: Sequence[Path], digest: str) -> list[tuple[_Run, float]]:
    """Return each task's run with the pool, and its advantage; ValueError for runs that do not calibrate a forecast."""
    tasks: dict[tuple[str, int], list[_Run]] = {}
    for folder in dict.fromkeys(folders):
        run = _read(folder, digest)
        tasks.setdefault((run.task_sha256, run.options.train_rows), []).append(run)
    pairs = []
    for runs in tasks.values():
        own = [run for run in runs if run.options.control == "none"]
        rotated = [run for run in runs if run.options.control == "rotated"]
        if len(own) != 1 or not rotated:
            given = ", ".join(str(run.folder) for run in runs)
            raise ValueError(
                f"{given}: a task for the calibration needs one run with the pool and one or more with "
                f"`--control rotated`, got {len(own)} and {len(rotated)}"
            )
        for run in rotated:
            if run.modules != own[0].modules:
                raise ValueError(f"{run.folder} fused other modules or seeds than {own[0].folder}: give the same ones")
            if other := [name for name in _ALIKE if getattr(run.options, name) != getattr(own[0].options, name)]:
                raise ValueError(
                    f"{run.folder} has another {other[0]} than {own[0].folder}: only --control may differ; fuse again"
                )
        advantage = float(np.mean([run.loss for run in rotated])) - own[0].loss
        pairs.append((own[0], advantage))
    if folders and (count := len({run.task_sha256 for run, _ in pairs})) < FEWEST:
        raise ValueError(f"the runs are of {count} tasks: a calibration needs {FEWEST} or more")
    return pairs


def _read(folder: Path, digest: str) -> _Run:
    options, _, config = load_run(folder)
    results = RunFolder(folder).results()
    if results is None:
        raise ValueError(f"{folder} is not complete: continue it with `lorafusion fuse --resume`")
    recipe, control = options.recipe, options.control
    if not isinstance(recipe, CoefficientsRecipe) or recipe.basis is not None or control not in ("none", "rotated"):
        got = options.method if control == "none" else f"{options.method} with --control {control}"
        raise ValueError(f"{folder} is a run of {got}: a calibration needs fusions of whole modules, own or rotated")
    check_sum(recipe.composition)
    if config["digests"]["base"] != digest:
        raise ValueError(f"{folder} has another base than the forecast: give runs of the same base")
    own_task(options, folder, config)
    losses = [seed["loss"] for seed in results["seeds"] if seed["loss"] is not None]
    if len(losses) < len(results["seeds"]):
        raise ValueError(f"{folder} has a test loss that is not finite: leave out the runs of its task")
    return _Run(folder, results["task"], config["task_sha256"], options, config["modules"], float(np.mean(losses)))


def _model(digest: str, cases: Sequence[Case]) -> tuple[Model | None, str]:
    """Return the model for a base, or None and the reason."""
    fitted = packaged()
    if not cases and fitted["base_sha256"] != digest:
        return None, f"the forecast was not fitted on this base: {_CALIBRATE}"
    model = fit(fitted["cases"])
    return model.calibrated(cases) if cases else model, ""
