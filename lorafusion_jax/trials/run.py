"""`lorafusion trial`: whether fusing a pool is worth it on a task, by tuned and cross-validated alternatives."""

import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import tyro

from ..estimates.estimate import Settings, trained_numbers
from ..estimates.machines import PlanFlagOptions
from ..io.hf import Base, open_base
from ..io.pool import AdapterFolders, ConvertedPool, open_pool
from ..methods import METHODS, find
from ..methods.lora import LoRARecipe
from ..methods.magnitudes import MagnitudesRecipe
from ..methods.recipes import PoolRecipe, TargetedRecipe
from ..methods.untrained import FewShotRecipe
from ..runs.folder import note
from ..runs.options import FuseOptions, options_to_json
from ..support.checks import at_least, check_uint32
from ..support.options import (
    DtypeOptions,
    PassesOptions,
    PoolOptions,
    RowOptions,
    SeedOptions,
)
from ..support.progress import progress
from ..tasks import Example, load_task
from ..training.recipe import Recipe
from .engines import EngineOptions, OutOfMemory, run_items
from .procedure import (
    Measure,
    Outcomes,
    Role,
    Scores,
    Training,
    TrialArm,
    divide,
    procedure,
)
from .rows import ResultRows, Row
from .trainer import Trainer, shortened
from .tuning import Tuned

if TYPE_CHECKING:
    from tqdm import tqdm

_DRAWS = (1, 2, 3)  # of a control
_COEFFICIENTS = (
    0.03  # rate of coefficients to start from, which fits few rows (see `tuning`)
)
_ROLES: dict[str, Role] = {  # by method
    "zero-shot": "base",
    "few-shot": "examples",
    "magnitudes": "magnitudes",
    "fusion": "pool",
    "single": "single",
    "lora": "lora",
}
_FORMAT = ("prompt", "input", "target", "chat")  # of rows
# Options of a run that a score depends on. Base, pool and rows have digests.
_SETTINGS = ("method", "control", "recipe", "adapters", "chat", "dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialOptions(
    EngineOptions,
    PlanFlagOptions,
    SeedOptions,
    DtypeOptions,
    PassesOptions,
    RowOptions,
    PoolOptions,
):
    """Find out whether fusing a pool is worth it on a task: a tuned, cross-validated comparison and a sentence.

    Without the pool: the base alone, examples in the prompt, magnitudes, a LoRA of the pool's rank. With it:
    LoRAFusion, the same with rotated modules (a control), and the best single module. The rates of each are tuned with
    the same number of steps. An interrupted trial continues when the same command is given again.

    Examples:
      lorafusion trial --base examples/small/base --pool examples/small/adapters --task examples/small/tasks/odd_dash \
--train-rows 40
      lorafusion trial --base base --pool pool --task rows.csv --input question --target answer --minutes 30
      lorafusion trial --base base --pool pool --task rows.csv --arms DoRA=dora "shuffled modules=fusion:shuffled"

    Attributes:
      task: one or more tasks, as in `lorafusion fuse`; of one with a training and a test part, only the first is used.
      chat: put the input into the model's own chat template.
      train_rows: use at most so many rows; by default all.
      arms: further arms, or others instead of those of the same names, as NAME=METHOD or NAME=METHOD:CONTROL.
      folds: parts of the rows; each is tested by models that were trained on the others.
      nested: tune the rates again inside each fold, which takes several times as long.
      minutes: stop after the fold in which so many minutes have passed.
      out: folder of the report and of all measurements.
    """

    task: tuple[str, ...]
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    train_rows: int | None = None
    arms: tuple[str, ...] = ()
    folds: int = 5
    nested: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    minutes: float | None = None
    out: Path = Path("runs/trial")


class Contestant(NamedTuple):
    """An arm of a trial, and the run that it stands for."""

    arm: TrialArm
    options: FuseOptions


def contestants(
    options: TrialOptions,
    task: str,
    rows: int,
    base: Base,
    pool: ConvertedPool | AdapterFolders,
) -> dict[str, Contestant]:
    """Return the arms of a trial on a task of so many rows, by name.

    Raises:
      ValueError: an arm that is not NAME=METHOD or NAME=METHOD:CONTROL, has no loss, or cannot be used here; none or
        several arms that fuse the pool.
    """
    shots = min(5, rows - -(-rows // options.folds))
    lora = LoRARecipe(lora_rank=pool.largest_rank, lora_targets=pool.targets)
    arms: dict[str, tuple[str, str, Recipe]] = {
        "base alone": ("zero-shot", "none", Recipe()),
        "examples in the prompt": (
            "few-shot",
            "none",
            FewShotRecipe(shots=shots),
        ),
        "magnitudes": (
            "magnitudes",
            "none",
            MagnitudesRecipe(lora_targets=pool.targets),
        ),
        "LoRAFusion": ("fusion", "none", METHODS["fusion"].recipe()),
        "rotated modules": ("fusion", "rotated", METHODS["fusion"].recipe()),
        "LoRA": ("lora", "none", lora),
        "best single module": ("single", "none", METHODS["single"].recipe()),
    }
    for text in options.arms:
        name, _, what = text.partition("=")
        method, _, control = what.partition(":")
        if not (name.strip() and method):
            raise ValueError(
                f"--arms {text!r} is no arm: give NAME=METHOD or NAME=METHOD:CONTROL"
            )
        recipe = find(method).recipe()
        if isinstance(recipe, TargetedRecipe):
            recipe = dataclasses.replace(recipe, lora_targets=pool.targets)
        arms[name] = (method, control or "none", recipe)
    chosen = {}
    for name, (method, control, recipe) in arms.items():
        entry = find(method)
        if entry.answers == "nothing":
            raise ValueError(
                f"arm {name}: the method {method} has no loss: leave it out of --arms"
            )
        entry.check()
        if isinstance(recipe, PoolRecipe):
            recipe = dataclasses.replace(
                recipe, modules=min(recipe.modules, len(pool.names))
            )
        run = FuseOptions(
            base=options.base,
            pool=options.pool if entry.pool else None,
            task=task,
            **{name: getattr(options, name) for name in (*_FORMAT, "dtype")},
            method=method,
            control=control,  # pyright: ignore[reportArgumentType] (`check` refuses others)
            recipe=dataclasses.replace(recipe, epochs=options.epochs),
            seeds=(options.seed,),
        )
        run.check()
        fused = Settings(
            recipe=run.recipe,
            rank=pool.largest_rank,
            targets=pool.targets,
            pool=len(pool.names),
        )
        arm = TrialArm(
            name=name,
            rates=_rates(run) if entry.learns == "trained" else {},
            draws=(0,) if control == "none" else _DRAWS,
            learns=entry.learns != "untrained" or entry.answers == "examples",
            role=_ROLES.get(method, "other") if control == "none" else "control",
            parameters=trained_numbers(base.config, method, fused),
        )
        chosen[name] = Contestant(arm, run)
    pools = [name for name, (arm, _) in chosen.items() if arm.role == "pool"]
    if len(pools) != 1:
        raise ValueError(
            f"{len(pools)} arms have the method fusion ({', '.join(pools) or 'none'}), expected one, which the others "
            "are compared with: give --arms other names or methods"
        )
    return chosen


def _rates(run: FuseOptions) -> dict[str, float]:
    """Return the learning rates that tuning starts from: those of the recipe that the method has a use for."""
    rates = {
        name: value
        for name, value in vars(run.recipe).items()
        if name.startswith("lr_")
    }
    if {"lr_coefficients", "lr_magnitudes"} <= rates.keys():
        rates = {
            "lr_magnitudes": rates.pop("lr_magnitudes"),
            "lr_coefficients": _COEFFICIENTS,
        } | rates
    return rates


def rows_of(options: TrialOptions, task: str) -> tuple[str, tuple[Example, ...]]:
    """Return the name of a task and the rows to use; ValueError for a task that cannot be read."""
    at_least(1, train_rows=options.train_rows)
    loaded = load_task(
        task,
        **{name: getattr(options, name) for name in _FORMAT},
        train_rows=0,
        need=(),
    )
    rows = (loaded.train or loaded.test)[: options.train_rows]
    if not rows:
        raise ValueError(f"{task} has no rows: give it rows with inputs and answers")
    return loaded.name, rows


class TaskTrial(NamedTuple):
    """A trial on one task.

    Attributes:
      task: name of the task.
      source: path or hub id of the task.
      rows: rows that are used.
      arms: arms by name, with their runs.
    """

    task: str
    source: str
    rows: tuple[Example, ...]
    arms: dict[str, Contestant]

    def epochs(self, arm: str, tuned: Tuned) -> int:
        """Return the epochs that an arm trains for."""
        return shortened(self.arms[arm].options.recipe, tuned.share).epochs

    def trainer(self) -> Trainer:
        """Return the models of the arms, which are loaded when they are used."""
        return Trainer({name: run for name, (_, run) in self.arms.items()}, self.rows)

    def outcomes(
        self,
        options: TrialOptions,
        measure: Measure,
        stop: Callable[[], bool] | None = None,
    ) -> Outcomes:
        """Return what `procedure` does with the arms."""
        return procedure(
            [arm for arm, _ in self.arms.values()],
            [row.input_sha256 for row in self.rows],
            measure,
            folds=options.folds,
            nested=options.nested,
            seed=options.seed,
            stop=stop,
        )

    def trainings(self, options: TrialOptions) -> list[Training]:
        """Return what is trained and tested, with rates as if the recipe's were the best."""
        planned: list[Training] = []

        def measure(trainings: Sequence[Training]) -> Iterator[Scores]:
            planned.extend(trainings)
            for training in trainings:
                default = self.arms[training.arm].arm.rates
                far = sum(
                    abs(math.log(value / default[name]))
                    for name, value in training.rates
                )
                # The longest training counts as the best one, so that a plan is not too short.
                far -= training.share
                yield Scores(
                    np.full(len(training.test), far), np.zeros(len(training.test), bool)
                )

        self.outcomes(options, measure)
        return planned


def trial(options: TrialOptions) -> Iterator[tuple[TaskTrial, Outcomes]]:
    """Yield each task with its outcomes; what OUT has already is not measured again.

    Raises:
      ValueError: before anything is trained: options, rows or arms that cannot be used, or an OUT of another trial.
    """
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"minutes is {options.minutes}: give a time above 0")
    check_uint32(seed=options.seed)
    all_tasks = task_trials(options)
    for task_trial in all_tasks:
        task_trial.trainings(options)  # raises for rows that are too few to tune on
    start_time = time.monotonic()
    for place, task_trial in enumerate(all_tasks, start=1):
        stop = None
        if options.minutes is not None:
            end = start_time + 60 * options.minutes * place / len(all_tasks)
            stop = functools.partial(_is_over, end)
        total = sum(
            _weight(task_trial, training) for training in task_trial.trainings(options)
        )
        with progress(task_trial.task, total, unit="row") as bar:
            yield (
                task_trial,
                task_trial.outcomes(options, _measure(options, task_trial, bar), stop),
            )


def _is_over(end: float) -> bool:
    return time.monotonic() > end


def task_trials(options: TrialOptions) -> list[TaskTrial]:
    """Return the tasks of a trial with their rows and arms; errors are those of `trial`."""
    base = open_base(options.base)
    all_tasks = []
    pool = open_pool(options.pool, base)
    for source in options.task:
        task, rows = rows_of(options, source)
        divide(
            [row.input_sha256 for row in rows], options.folds, (options.seed,)
        )  # raises for too few rows
        all_tasks.append(
            TaskTrial(
                task, source, rows, contestants(options, source, len(rows), base, pool)
            )
        )
    if len({task_trial.task for task_trial in all_tasks}) < len(all_tasks):
        raise ValueError(
            f"two tasks have the same name in {', '.join(task_trial.task for task_trial in all_tasks)}: rename one"
        )
    return all_tasks


def _weight(task_trial: TaskTrial, training: Training) -> int:
    """Return the number of rows that a training and its test pass through the model, about."""
    arm, run = task_trial.arms[training.arm]
    epochs = 3 * training.share * run.recipe.epochs if arm.rates else 1
    return round(epochs * len(training.train)) + len(training.test)


def _measure(options: TrialOptions, task_trial: TaskTrial, bar: "tqdm") -> Measure:
    """Return a function that reads scores from OUT, and measures those that are missing there."""
    trainer = task_trial.trainer()
    settings = {name: _settings(run) for name, (_, run) in task_trial.arms.items()}
    digests = _digests(trainer)
    common = {"base_and_pool": digests[0], "rows": digests[1], "seed": options.seed}
    results = ResultRows(
        options.out / task_trial.task / "measured.jsonl", _key_of, common
    )

    def measure(trainings: Sequence[Training]) -> Iterator[Scores]:
        keys = {each: (settings[each.arm], each) for each in trainings}
        rows = {_key_of(row): row for row in results.rows()}
        missing = [each for each, key in keys.items() if key not in rows]
        # An extended grid is not in the plan.
        bar.total = max(
            bar.total, bar.n + sum(_weight(task_trial, each) for each in keys)
        )
        bar.update(
            sum(_weight(task_trial, each) for each in keys if each not in missing)
        )
        work = trainer.scores
        if options.engine == "ray":
            work = functools.partial(
                _scores_on_worker, options, task_trial.source, digests
            )
        for training, scores in run_items(work, missing, options):
            arm = training.arm
            if isinstance(scores, OutOfMemory):
                what = f"{task_trial.task}, {arm}: out of memory ({scores.error})"
                raise ValueError(
                    f"{what}: use --dtype bfloat16 or another machine; {results.file} keeps what it has"
                )
            row = common | _row(settings[arm], training, scores)
            results.append(results.file, [row])
            rows[keys[training]] = row
            bar.update(_weight(task_trial, training))
            arm_keys = [keys[each] for each in keys if each.arm == arm and each.answers]
            if arm_keys and all(key in rows for key in arm_keys):
                if sys.stderr.isatty():
                    bar.clear()
                note(_progress(arm, [rows[key] for key in arm_keys]))
        yield from (_scores(rows[keys[each]]) for each in trainings)

    return measure


def _progress(arm: str, rows: Sequence[Row]) -> str:
    """Return a line about the tested rows of an arm."""
    loss = np.mean(np.concatenate([row["loss"] for row in rows]))
    correct = np.concatenate([row["correct"] for row in rows])
    return f"{arm}: {len(correct)} answers, loss {loss:.3f} nats, exact match {100 * np.mean(correct):.1f} %"


def _scores_on_worker(
    options: TrialOptions, source: str, digests: tuple[str, str], training: Training
) -> Scores:
    """Return the scores of a training in a process of Ray, which loads the models by itself."""
    return _trainer_on_worker(options, source, digests).scores(training)


@functools.lru_cache(maxsize=1)
def _trainer_on_worker(
    options: TrialOptions, source: str, digests: tuple[str, str]
) -> Trainer:
    """Return the models of a task; ValueError if base, pool or rows are not those with the digests.

    A process keeps those of the last digests, so that it does not load them for each training.
    """
    (task_trial,) = task_trials(dataclasses.replace(options, task=(source,)))
    trainer = task_trial.trainer()
    if (loaded := _digests(trainer)) != digests:
        differing = [
            what
            for what, before, after in zip(
                ("base or pool", "rows"), digests, loaded, strict=True
            )
            if before != after
        ]
        raise ValueError(
            f"{source}: this node has another {' and other '.join(differing)} than the node that the command runs on: "
            "copy the files, or give a path that all nodes share"
        )
    return trainer


def _digests(trainer: Trainer) -> tuple[str, str]:
    """Return digests of base and pool, and of the rows."""
    return _digest(trainer.digests), _digest([row.row for row in trainer.rows])


def _settings(run: FuseOptions) -> str:
    """Return a digest of the settings of an arm, other than its rates."""
    values = options_to_json(run)
    return _digest([values[name] for name in _SETTINGS])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _row(settings: str, training: Training, scores: Scores) -> Row:
    marks = {
        name: values if values is None else values.tolist()
        for name, values in scores._asdict().items()
    }
    return {"settings": settings, **training._asdict(), **marks}


def _key_of(row: Row) -> tuple[str, Training]:
    rates = tuple((name, rate) for name, rate in row["rates"])
    rows = tuple(row["train"]), tuple(row["test"])
    return row["settings"], Training(
        row["arm"], row["draw"], rates, row["share"], *rows, row["answers"]
    )


def _scores(row: Row) -> Scores:
    """Return the scores of a row; a loss that JSON holds as null was not finite."""
    values: Any = (
        None if row[name] is None else np.array(row[name]) for name in Scores._fields
    )
    return Scores(*values)
