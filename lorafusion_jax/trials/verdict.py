"""Verdict of a trial: contrasts with LoRAFusion, and a sentence by fixed rules.

Folds share most training rows, so losses of different folds are not independent. Intervals of a task are t intervals
over inputs (rows with the same input are one unit) whose variance is multiplied by 1 + folds / (folds - 1): the
correction of Nadeau and Bengio (2003), on rows instead of folds. An arm is named if it is not worse than each other arm
by a margin; because each bound must hold, none is corrected for the number of arms. Levels and margins were chosen by
simulations (experiments/trial_coverage.md); docs/results/pools.md has the shares of intervals and sentences that are
right.

Intervals hold for the folds and for the draws of a control that were measured, whose losses are averaged per row.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from ..report import Interval, Sample, holm
from .procedure import Outcomes, Role, TrialArm
from .tuning import Tuned

MARGIN = 0.05  # nats per answer token: arms that differ by less are as good
CLOSE = 0.3  # nats per answer token: without a winner, the rows suffice if the best arm so far is as close as that
NAMING = 0.9  # of the one-sided bounds that name an arm

_WINS: dict[Role, str] = {
    "base": "Train nothing: the base alone is as good.",
    "examples": "Train nothing: examples in the prompt are as good.",
    "single": "The best single module is as good: no fusion needed.",
    "magnitudes": "Magnitudes alone are as good: no pool needed.",
    "pool": "Use the pool.",
    "control": "{title} are better than the pool's: its content does not help.",
    "lora": "Train a LoRA.",
    "other": "Use {name}.",
}
_Table = dict[str, Float[np.ndarray, "units"]]  # by arm
_ORDER = tuple(_WINS)  # cheaper first, of arms that train as many parameters


class Contrast(NamedTuple):
    """An arm minus LoRAFusion.

    Attributes:
      arm: name of the arm.
      loss: nats per answer token.
      p: two-sided p of the loss after Holm's correction over all contrasts.
      correct: percentage points of exact match.
      option_correct: percentage points of right options, if the task has options.
    """

    arm: str
    loss: Interval
    p: float
    correct: Interval
    option_correct: Interval | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Verdict on a task, or over tasks.

    Attributes:
      decision: "named" if no other arm is better by more than `MARGIN`, "close" if none is by more than `CLOSE`.
      arm: name of the cheapest such arm, or of the best one so far; None if more rows are needed.
      sentence: the verdict.
      least: a line with the arm of least cross-validated loss, the choice without intervals.
      rows: rows, or tasks, that would name an arm, or that would decide if more are needed; None for a named arm.
      notes: sentences about the pool's content, ends of grids, and arms that diverged.
      contrasts: contrasts with LoRAFusion, of arms that did not diverge.
    """

    decision: Literal["named", "close", "more"]
    arm: str | None
    sentence: str
    least: str
    rows: int | None
    notes: tuple[str, ...]
    contrasts: tuple[Contrast, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """The sentence, the arm of least loss, and the notes."""
        return (self.sentence, self.least, *self.notes)


def judge(outcomes: Outcomes) -> Verdict:
    """Return the verdict on a task, from the rows of the folds that were tested.

    Raises:
      ValueError: not exactly one arm has the role "pool".
    """
    measured, tables = _measured(outcomes)
    notes = [
        _extended(name, tuned)
        for name, tuned in outcomes.tuned.items()
        if tuned.in_grid
    ]
    folds = int(outcomes.fold.max()) + 1
    sample = Sample(outcomes.groups[measured], 1 + folds / (folds - 1))
    return _judge(outcomes.arms, sample, "rows", tables, notes)


def _measured(outcomes: Outcomes) -> tuple[Bool[np.ndarray, " rows"], list[_Table]]:
    """Return the rows that all arms were tested on, and their losses, matches and options, each a mean over draws."""
    measured = np.all(
        [np.isfinite(table).all(axis=0) for table in outcomes.correct.values()], axis=0
    )
    return measured, [
        {name: values.mean(axis=0)[measured] for name, values in table.items()}
        for table in (outcomes.loss, outcomes.correct, outcomes.option_correct)
    ]


def _extended(name: str, tuned: Tuned) -> str:
    assert tuned.in_grid is not None
    (rate, before), *_ = tuned.in_grid
    after = tuned.rates[0][1]
    text = f"The best rate of {name} was an end of the grid, which was extended once: {rate} {before:.2g} before"
    text += f", {after:.2g} after."
    return text + (" Others beyond it may be better." if tuned.edge else "")


def judge_tasks(tasks: Sequence[Outcomes]) -> Verdict:
    """Return the verdict over tasks that count as a random sample of their kind, each by the rows that were tested.

    Raises:
      ValueError: a task has other arms than the first one, or not exactly one arm has the role "pool".
    """
    arms = tasks[0].arms
    for number, outcomes in enumerate(tasks):
        if (names := [arm.name for arm in outcomes.arms]) != [arm.name for arm in arms]:
            raise ValueError(
                f"task {number} has the arms {', '.join(names)}: give all tasks the arms of the first one"
            )

    tables = [
        {
            name: np.array([table[name].mean() for table in task_rows])
            for name in set.intersection(*map(set, task_rows))
        }
        for task_rows in zip(
            *(_measured(task_trial)[1] for task_trial in tasks), strict=True
        )
    ]
    return _judge(arms, Sample(np.arange(len(tasks))), "tasks", tables, notes=[])


def _judge(
    arms: Sequence[TrialArm],
    sample: Sample,
    unit: Literal["rows", "tasks"],
    tables: Sequence[_Table],
    notes: list[str],
) -> Verdict:
    if len(pools := [arm.name for arm in arms if arm.role == "pool"]) != 1:
        raise ValueError(
            f'{len(pools)} arms have the role "pool": contrasts need exactly one'
        )
    loss = tables[0]
    diverged = [arm.name for arm in arms if not np.isfinite(loss[arm.name]).all()]
    notes = [
        *notes,
        *(
            f"{name} is not compared, because its loss is NaN or infinite."
            for name in diverged
        ),
    ]
    arms = sorted((arm for arm in arms if arm.name not in diverged), key=_cost)
    if not arms:
        raise ValueError(
            "the loss of every arm is NaN or infinite: check the base and the rows"
        )
    contrasts = (
        () if pools[0] in diverged else _contrasts(arms, pools[0], sample, tables)
    )
    losses = np.stack([loss[arm.name] for arm in arms])
    first = int(np.argmin(losses.mean(axis=1)))
    difference = losses.mean(axis=1)[:, None] - losses.mean(
        axis=1
    )  # of the row's arm minus the column's
    error = sample.error(losses[:, None] - losses)
    np.fill_diagonal(error, 0)
    half = sample.reach(1 - NAMING) * error
    bounds = difference + half
    worst = bounds.max(axis=1)
    if (is_worse := worst < MARGIN).any():
        place = int(np.argmax(is_worse))  # the first one is the cheapest
        arm = arms[place]
        decision = "named"
        rows = None
        sentence = _WINS[arm.role].format(
            name=arm.name, title=arm.name[:1].upper() + arm.name[1:]
        )
        if arm.role == "pool":
            as_good = [
                one.name
                for one, bound in zip(arms, bounds[:, place], strict=True)
                if bound < MARGIN
            ]
            controls = [
                one.name
                for one in arms
                if one.role == "control" and one.name in as_good
            ]
            notes += [
                f"{name} is as good, so it is not the pool's content that helps."
                for name in controls
            ]
    elif worst.min() < CLOSE:
        arm = arms[int(np.argmin(worst))]
        decision = "close"
        rows = _deciding(difference, half, MARGIN, len(sample.groups), unit)
        sentence = f"No clear winner: {arm.name} is the best so far, no arm is better by more than {CLOSE:g} nats, and "
        sentence += f"about {rows} {unit} would decide."
    else:
        arm = None
        decision = "more"
        rows = _deciding(difference, half, CLOSE, len(sample.groups), unit)
        place = int(np.argmin(worst))
        width = sample.reach(0.025) * error[place, int(np.argmax(bounds[place]))]
        sentence = f"More {unit} needed"
        sentence += (
            f": the interval is ±{width:.2f} nats; about {rows} {unit} would decide."
            if rows
            else "."
        )
    return Verdict(
        decision=decision,
        arm=arm and arm.name,
        sentence=sentence,
        least=f"Least cross-validated loss: {arms[first].name}, {losses[first].mean():.3f} nats.",
        rows=rows,
        notes=tuple(notes),
        contrasts=contrasts,
    )


def _cost(arm: TrialArm) -> tuple[int, int]:
    return arm.parameters, _ORDER.index(arm.role)


def _deciding(
    difference: Float[np.ndarray, "arms arms"],
    half: Float[np.ndarray, "arms arms"],
    margin: float,
    units: int,
    unit: Literal["rows", "tasks"],
) -> int | None:
    """Return how many rows bring the bounds of an arm below a margin, if the differences stay; None if none do."""
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(difference < margin, half / (margin - difference), np.inf)
    rows = units * np.min(np.max(times, axis=1)) ** 2
    step = 10 if unit == "rows" else 1
    return math.ceil(rows / step) * step if np.isfinite(rows) else None


def _contrasts(
    arms: Sequence[TrialArm],
    pool: str,
    sample: Sample,
    tables: Sequence[_Table],
) -> tuple[Contrast, ...]:
    others = [arm.name for arm in arms if arm.name != pool]

    def differences(
        table: dict[str, Float[np.ndarray, " units"]],
    ) -> dict[str, Float[np.ndarray, " units"]]:
        if pool not in table:
            return {}
        return {name: table[name] - table[pool] for name in others if name in table}

    loss = differences(tables[0])
    correct = differences(tables[1])
    option_correct = differences(tables[2])
    corrected = holm([sample.p(loss[name]) for name in others])
    return tuple(
        Contrast(
            arm=name,
            loss=sample.interval(loss[name]),
            p=p,
            correct=sample.interval(100 * correct[name], most=100.0),
            option_correct=sample.interval(100 * option_correct[name], most=100.0)
            if name in option_correct
            else None,
        )
        for name, p in zip(others, corrected, strict=True)
    )
