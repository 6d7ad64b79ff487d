"""Plan of a trial: trained steps and time of each arm, from a short calibration on this machine."""

import dataclasses
import time
from typing import NamedTuple

from ..methods.recipes import modules_of
from ..support.platform import for_cpu
from ..support.text_tables import plain
from .lanes import Lanes, shortened
from .procedure import Training
from .run import TaskTrial, TrialOptions, task_trials

# A method compiles programs for each stage of the tuning and for the folds, of several shapes. Measured on the embedded
# trial, in units of one training with answers; a method that is not trained has no step to compile.
_TRAINED = 4.0
_UNTRAINED = 0.5


class Calibration(NamedTuple):
    """Seconds of LoRAFusion: for a row of an epoch, for an answered row, and to compile a training with answers."""

    trained: float
    generated: float
    compiled: float


def describe_trial(options: TrialOptions) -> str:
    """Return trainings, steps and minutes of each arm; errors are those of `trial`."""
    tried = task_trials(options)
    calibration = _calibrated(options, tried[0])
    lines = [["arm", "trainings", "steps", "minutes"]]
    total = 0.0
    by_arm: dict[str, list[tuple[TaskTrial, Training]]] = {}
    for one in tried:
        for training in one.trainings(options):
            by_arm.setdefault(training.arm, []).append((one, training))
    compiled: set[str] = set()
    for name, trainings in by_arm.items():
        entry = trainings[0][0].arms[name].options.entry
        seconds = sum(
            _seconds(one, training, calibration) for one, training in trainings
        )
        if entry.name not in compiled:
            seconds += calibration.compiled * (
                _TRAINED if entry.learns == "trained" else _UNTRAINED
            )
        compiled.add(entry.name)
        steps = sum(one.lanes(options).steps(training) for one, training in trainings)
        counted = len(trainings) if trainings[0][0].arms[name].arm.rates else 0
        lines.append([name, f"{counted:,}", f"{steps:,}", f"{seconds / 60:.1f}"])
        total += seconds
    lines.append(["all", "", "", f"{total / 60:.1f}"])
    rows = ", ".join(f"{one.task} with {len(one.rows)} rows" for one in tried)
    return (
        f"{rows}; {options.folds} folds\n{plain(lines)}\n"
        "Minutes are those of this machine, idle, from an epoch of LoRAFusion; about, within a factor of 1.5."
    )


def _seconds(one: TaskTrial, training: Training, calibration: Calibration) -> float:
    run = one.arms[training.arm].options
    entry = run.entry
    generated = training.answers * len(training.test) * calibration.generated
    if entry.learns == "trained":
        return (
            shortened(run.recipe, training.share).epochs
            * len(training.train)
            * calibration.trained
            + generated
        )
    passes = (
        entry.evaluations(run.recipe, modules_of(run.recipe))
        if entry.search is not None
        else 0
    )
    return passes * len(training.train) * calibration.trained / 3 + generated


def _calibrated(options: TrialOptions, one: TaskTrial) -> Calibration:
    """Return the seconds of a short training of LoRAFusion."""
    arm = next(arm for arm, _ in one.arms.values() if arm.role == "pool")
    last = [
        training for training in one.trainings(options) if training.arm == arm.name
    ][-1]
    run = one.arms[arm.name].options
    short = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, epochs=2))
    lanes = Lanes({arm.name: short}, one.rows, options.seed)
    rates = tuple(arm.rates.items())

    # Other processes on a CPU make a second longer, but take none of this one's.
    clock = time.process_time if for_cpu() else time.perf_counter

    def seconds(share: float) -> float:
        began = clock()
        list(
            lanes.measure([last._replace(rates=rates, share=share, answers=share == 1)])
        )
        return clock() - began

    _ = lanes.digests  # loads the model
    seconds(0.5)
    first = seconds(1.0)
    again = seconds(1.0)
    one_epoch = seconds(0.5)
    tested = (
        len(last.test) / 3 / len(last.train)
    )  # of an epoch, for the loss of the test rows
    epoch = one_epoch / (1 + tested)
    return Calibration(
        trained=epoch / len(last.train),
        generated=max(again - (2 + tested) * epoch, 0) / len(last.test),
        compiled=max(first - again, 0),
    )
