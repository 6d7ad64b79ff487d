"""Verdict of a trial: which methods can be told apart, and a sentence by fixed rules.

A method is named if it is not worse than each other one by the margin; because each bound must hold, none is corrected
for the number of methods. Levels and the margin were chosen by simulations (experiments/trial_coverage.md);
docs/results/pools.md has the shares of intervals and sentences that are right. Intervals hold for the folds and the
draw of a control that were measured.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ..report import Interval, Sample
from .procedure import MARGIN, Outcomes, Role, TrialArm, best_arm

NAMING = 0.9  # of the one-sided bounds that name a method
_APART = 0.05  # that a method is said to be worse than the best one by chance, over all methods

_WINS: dict[Role, str] = {
    "base": "Train nothing: the base alone is as good.",
    "examples": "Train nothing: examples in the prompt are as good.",
    "single": "The nearest adapter is as good as it is: train nothing.",
    "magnitudes": "Magnitudes alone are as good: no pool needed.",
    "pool": "Use the pool: train LoRAFusion.",
    "warm": "Train the nearest adapter further.",
    "control": "Random adapters are as good as the pool's: its content does not help.",
    "lora": "Train a LoRA.",
    "other": "Use {name}.",
}
_ORDER = tuple(_WINS)  # cheaper first, of methods that train as many parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Verdict on a task, or over tasks.

    Attributes:
      arm: name of the method to use: the cheapest one that is not worse than any other by `MARGIN`, or that of least
        loss.
      is_named: the rows show that no other method is better by `MARGIN`.
      sentence: the verdict.
      rows: rows, or tasks, that would name a method; None if one is named, or if no number of rows would.
      loss: loss of each method; where rows did not test it, as far from the best one as on those that did.
      behind: each method's loss minus that of the method of least loss, which has no entry; none without spread.
    """

    arm: str
    is_named: bool
    sentence: str
    rows: int | None
    loss: dict[str, float]
    behind: dict[str, Interval]


def judge(outcomes: Outcomes) -> Verdict:
    """Return the verdict on a task, from the rows that were tested.

    Raises:
      ValueError: no method has a finite loss.
    """
    best = best_arm(outcomes)
    left = [arm.name for arm in outcomes.arms if arm.name not in outcomes.out]
    rows = outcomes.common_rows(*left)
    best_loss = float(np.nanmean(outcomes.loss[best]))
    if not np.isfinite(best_loss):
        raise ValueError(
            "the loss of every method is NaN or infinite: check the base and the rows"
        )
    loss = {}
    behind = {}
    for name, values in outcomes.loss.items():
        shared = outcomes.common_rows(name, best)
        difference = (values - outcomes.loss[best])[shared]
        loss[name] = best_loss + float(difference.mean())
        if name != best and np.isfinite(difference).all():
            behind[name] = outcomes.sample(shared).interval(difference)
    table = {name: outcomes.loss[name][rows] for name in left}
    return _judge(
        outcomes.arms, best, outcomes.sample(rows), table, loss, behind, "rows"
    )


def judge_tasks(tasks: Sequence[Outcomes]) -> Verdict:
    """Return the verdict over tasks that count as a random sample of their kind.

    Raises:
      ValueError: no method was measured on all tasks.
    """
    verdicts = [judge(outcomes) for outcomes in tasks]
    shared = set.intersection(*(set(verdict.loss) for verdict in verdicts))
    arms = [arm for arm in tasks[0].arms if arm.name in shared]
    if not arms:
        raise ValueError("no method was measured on all tasks: give more --minutes")
    table = {
        arm.name: np.array([verdict.loss[arm.name] for verdict in verdicts])
        for arm in arms
    }
    best = min(table, key=lambda name: table[name].mean())
    sample = Sample(np.arange(len(tasks)))
    loss = {name: float(values.mean()) for name, values in table.items()}
    behind = {
        name: sample.interval(values - table[best])
        for name, values in table.items()
        if name != best and np.isfinite(values).all()
    }
    return _judge(arms, best, sample, table, loss, behind, "tasks")


def _judge(
    arms: Sequence[TrialArm],
    best: str,
    sample: Sample,
    table: dict[str, Float[np.ndarray, " units"]],
    loss: dict[str, float],
    behind: dict[str, Interval],
    unit: str,
) -> Verdict:
    """Return the verdict on methods that are left, whose losses the table has."""
    left = [
        arm for arm in arms if arm.name in table and np.isfinite(table[arm.name]).all()
    ]
    left.sort(key=lambda arm: (arm.parameters, _ORDER.index(arm.role)))
    least = f"Least cross-validated loss: {best}, {loss[best]:.3f} nats per token."
    losses = np.stack([table[arm.name] for arm in left])
    # [arms, arms], of the row's method minus the column's.
    difference = losses.mean(axis=1)[:, None] - losses.mean(axis=1)
    error = sample.error(losses[:, None] - losses)
    np.fill_diagonal(error, 0)
    half = sample.reach(1 - NAMING) * error
    worst = (difference + half).max(axis=1)
    level = _APART / max(len(loss) - 1, 1)
    place = left.index(next(arm for arm in left if arm.name == best))
    beyond = difference[:, place] - sample.reach(level) * error[:, place] > 0
    close = [arm for arm, is_apart in zip(left, beyond, strict=True) if not is_apart]
    out = [name for name in loss if name not in {arm.name for arm in close}]
    named = next(
        (arm for arm, bound in zip(left, worst, strict=True) if bound < MARGIN), None
    )
    rows = None
    if named is None:
        # With this many, the bounds of a method are below the margin, if the differences stay as they are.
        with np.errstate(divide="ignore", invalid="ignore"):
            times = np.where(difference < MARGIN, half / (MARGIN - difference), np.inf)
        needed = len(sample.groups) * np.min(np.max(times, axis=1)) ** 2
        step = 10 if unit == "rows" else 1
        rows = math.ceil(needed / step) * step if np.isfinite(needed) else None
    parts = []
    if named is not None and len(loss) > 1:
        parts.append(_WINS[named.role].format(name=named.name))
    elif len(close) > 1:
        parts.append(
            f"{_list([arm.name for arm in close])} cannot be told apart with {len(sample.groups)} {unit}"
            + (f"; about {rows} would do." if rows else ".")
        )
    if out and named is None:
        parts.append(f"Out: {_list(out)}.")
    roles = {arm.role for arm in close}
    if {"pool", "control"} <= roles and (named or left[place]).role == "pool":
        parts.append(
            "Random adapters are not clearly worse, so it may not be the pool's content that helps."
        )
    return Verdict(
        arm=named.name if named else best,
        is_named=named is not None,
        sentence=" ".join([*parts, least]),
        rows=rows,
        loss=loss,
        behind=behind,
    )


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
