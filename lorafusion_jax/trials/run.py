"""`lorafusion trial`: whether fusing a pool is worth it on a task, by tuned and cross-validated alternatives."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..estimates.params import trainable_count
from ..io.hf import Base, open_base
from ..io.pool import AdapterFolders, ConvertedPool, open_pool
from ..methods import find
from ..methods.entry import PlannedPool, PoolRecipe, recipe_of
from ..methods.lora import is_warm
from ..runs.options import FuseOptions, options_to_json
from ..support import interrupts
from ..support.checks import at_least, check_uint32
from ..support.options import TrialOptions as TrialOptions
from ..support.progress import progress
from ..tasks import Example, load_task
from .engines import OutOfMemory, connected, run_items
from .procedure import (
    TUNING_PARTS,
    Candidate,
    Measure,
    Outcomes,
    Role,
    Scores,
    TimeIsOver,
    Training,
    TrialArm,
    divide,
    procedure,
)
from .rows import ResultRows, Row, append_lines
from .trainer import Trainer, shortened

if TYPE_CHECKING:
    from tqdm import tqdm

_COEFFICIENTS = (
    0.03  # rate of coefficients to start from, which fits few rows (see `halving`)
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
      ValueError: an arm that is not NAME=METHOD or NAME=METHOD:CONTROL, has no loss, or cannot be used here.
    """
    common = {"lora_targets": pool.targets, "epochs": options.epochs}
    defaults = common | {
        "shots": min(5, rows - -(-rows // options.folds)),
        "lora_rank": pool.largest_rank,
    }
    further = defaults | {"warm_start": "single"}
    # METHOD or METHOD:CONTROL, and fields of the recipe.
    arms: dict[str, tuple[str, dict[str, Any]]] = {
        "base alone": ("zero-shot", defaults),
        "examples in the prompt": ("few-shot", defaults),
        "magnitudes": ("magnitudes", defaults),
        "LoRAFusion": ("fusion", defaults),
        "random adapters": ("fusion:rotated", defaults),
        "LoRA": ("lora", defaults),
        "nearest adapter": ("single", defaults),
        "nearest adapter, trained further": ("lora", further),
    }
    for text in options.arms:
        name, _, method_text = text.partition("=")
        if not (name.strip() and method_text.partition(":")[0]):
            raise ValueError(
                f"--arms {text!r} is no arm: give NAME=METHOD or NAME=METHOD:CONTROL"
            )
        arms[name] = (method_text, common)
    chosen = {}
    for name, (method_text, fields) in arms.items():
        method, _, control = method_text.partition(":")
        control = control or "none"
        entry = find(method)
        if entry.answers == "nothing":
            raise ValueError(
                f"arm {name}: the method {method} has no loss: leave it out of --arms"
            )
        entry.check()
        recipe = recipe_of(entry.recipe, fields)
        if isinstance(recipe, PoolRecipe):
            recipe = dataclasses.replace(
                recipe, modules=min(recipe.modules, len(pool.names))
            )
        run = FuseOptions(
            base=options.base,
            pool=options.pool if entry.pool or is_warm(recipe) else None,
            task=task,
            **{name: getattr(options, name) for name in (*_FORMAT, "dtype")},
            method=method,
            control=control,  # pyright: ignore[reportArgumentType] (`check` refuses others)
            recipe=recipe,
            seeds=(options.seed,),
        )
        run.check()
        fused = PlannedPool(pool.largest_rank, len(pool.names), pool.targets)
        parameters = trainable_count(entry, base.config, run.recipe, fused)
        role = _ROLES.get(method, "other")
        if control != "none":
            role = "control"
        elif is_warm(run.recipe):
            role = "warm"
        arm = TrialArm(
            name=name,
            rates=_rates(run) if entry.learns == "trained" else {},
            draw=0 if control == "none" else 1,
            learns=entry.learns != "untrained" or entry.answers == "examples",
            role=role,
            parameters=sum(parameters.values()),
        )
        chosen[name] = Contestant(arm, run)
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

    def epochs(self, arm: str, tuned: Candidate) -> int:
        """Return the epochs that an arm trains for."""
        return shortened(self.arms[arm].options.recipe, tuned.share).epochs

    def trainer(self) -> Trainer:
        """Return the models of the arms, which are loaded when they are used."""
        return Trainer({name: run for name, (_, run) in self.arms.items()}, self.rows)

    def outcomes(self, options: TrialOptions, measure: Measure) -> Iterator[Outcomes]:
        """Return what `procedure` does with the methods."""
        return procedure(
            [arm for arm, _ in self.arms.values()],
            [row.input_sha256 for row in self.rows],
            measure,
            folds=options.folds,
            seed=options.seed,
        )

    def trainings(self, options: TrialOptions) -> list[Training]:
        """Return what is trained and tested if the default rates are the best, and no method is out."""
        planned: list[Training] = []

        def measure(trainings: Sequence[Training]) -> Iterator[Scores]:
            planned.extend(trainings)
            for training in trainings:
                default = self.arms[training.arm].arm.rates
                is_default = dict(training.rates) == default
                # The longest training counts as the best one, so that a plan is not too short.
                loss = np.full(len(training.test), 1.0 - is_default - training.share)
                yield Scores(loss, np.zeros(len(loss)))

        for _ in self.outcomes(options, measure):
            pass
        return planned


def trial(options: TrialOptions) -> Iterator[tuple[TaskTrial, Outcomes]]:
    """Yield each task with its outcomes, after each round; what OUT has already is not measured again.

    Raises:
      ValueError: before anything is trained: options, rows or methods that cannot be used, or an OUT of another trial.
    """
    if options.minutes != "none" and not options.minutes > 0:
        raise ValueError(f"minutes is {options.minutes}: give a time above 0, or none")
    check_uint32(seed=options.seed)
    all_tasks = task_trials(options)
    start_time = time.monotonic()
    for place, task_trial in enumerate(all_tasks, start=1):
        deadline = float("inf")
        if options.minutes != "none":
            deadline = start_time + 60 * options.minutes * place / len(all_tasks)
        total = sum(
            _weight(task_trial, training) for training in task_trial.trainings(options)
        )
        with (
            connected(options),
            interrupts.released(),
            progress(task_trial.task, total, unit="row") as bar,
        ):
            interrupts.hold("this training")
            measure = _measure(options, task_trial, bar, deadline)
            for outcomes in task_trial.outcomes(options, measure):
                yield task_trial, outcomes


def task_trials(options: TrialOptions) -> list[TaskTrial]:
    """Return the tasks of a trial with their rows and arms; errors are those of `trial`."""
    base = open_base(options.base)
    all_tasks = []
    pool = open_pool(options.pool, base)
    at_least(1, train_rows=options.train_rows)
    row_format = {name: getattr(options, name) for name in _FORMAT}
    for source in options.task:
        loaded = load_task(source, **row_format, train_rows=0, need=())
        rows = (loaded.train or loaded.test)[: options.train_rows]
        if not rows:
            raise ValueError(
                f"{source} has no rows: give it rows with inputs and answers"
            )
        for parts in (TUNING_PARTS, options.folds):  # raises for too few rows
            divide([row.input_sha256 for row in rows], parts, options.seed)
        all_tasks.append(
            TaskTrial(
                loaded.name,
                source,
                rows,
                contestants(options, source, len(rows), base, pool),
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


def _measure(
    options: TrialOptions, task_trial: TaskTrial, bar: "tqdm", deadline: float
) -> Measure:
    """Return a function that reads scores from OUT, and measures those that are missing there."""
    trainer = task_trial.trainer()
    runs = {name: options_to_json(run) for name, (_, run) in task_trial.arms.items()}
    settings = {
        name: _digest([run[field] for field in _SETTINGS]) for name, run in runs.items()
    }
    digests = _digests(trainer)
    common = {"base_and_pool": digests[0], "rows": digests[1], "seed": options.seed}
    results = ResultRows(
        options.out / task_trial.task / "measured.jsonl", _key_of, common
    )

    measured = 0  # at least one, so that a trial with little time goes on

    def described(training: Training) -> Row:
        return {"settings": settings[training.arm], **training._asdict()}

    def measure(trainings: Sequence[Training]) -> Iterator[Scores]:
        nonlocal measured
        rows = {_key_of(row): row for row in results.rows()}
        keys = [_key_of(described(training)) for training in trainings]
        missing = [
            training
            for key, training in zip(keys, trainings, strict=True)
            if key not in rows
        ]
        work = trainer.scores
        if options.engine == "ray":
            work = functools.partial(
                _scores_on_worker, options, task_trial.source, digests
            )
        items = iter(run_items(work, missing, options))
        for training, key in zip(trainings, keys, strict=True):
            bar.set_postfix_str(training.arm)
            while key not in rows:
                is_over = measured and time.monotonic() > deadline
                if rows and (is_over or interrupts.asked()):
                    raise TimeIsOver
                finished, scores = next(items)
                if isinstance(scores, OutOfMemory):
                    raise ValueError(
                        f"{task_trial.task}, {finished.arm}: out of memory ({scores.error}): use --dtype bfloat16 or "
                        f"another machine; {results.file} keeps what it has"
                    )
                row = common | described(finished)
                for name, values in scores._asdict().items():
                    row[name] = np.asarray(values).tolist()
                append_lines(results.file, [row])
                rows[_key_of(row)] = row
                measured += 1
            weight = _weight(task_trial, training)
            bar.total = max(bar.total, bar.n + weight)  # a longer search of rates
            bar.update(weight)
            row = rows[key]
            tables = {
                name: None if row[name] is None else np.array(row[name], float)
                for name in ("loss", "correct", "option_correct")
            }
            yield Scores(**tables, seconds=row["seconds"])  # pyright: ignore[reportArgumentType] (a loss is never None)

    return measure


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


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _key_of(row: Row) -> str:
    return json.dumps([row["settings"], *(row[name] for name in Training._fields)])
