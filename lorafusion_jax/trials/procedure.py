"""Procedure of a trial: rounds of measurements, each followed by the outcomes so far.

1. Methods that train nothing.
2. Every other method at its default rates and a quarter of its epochs, on two thirds of the rows, tested on the others.
3. Rates and epochs of each method on the same thirds, by successive halving (see `halving`).
4. Cross-validation, fold by fold, of the methods that are left. Its losses replace those of the thirds.

After each fold, a method is out when it is worse than the best one by more than a margin.
"""

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import (
    Callable,
    Generator,
    Hashable,
    Iterable,
    Iterator,
    Sequence,
)
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ..report import Sample

Role = Literal[
    "base",
    "examples",
    "magnitudes",
    "pool",
    "control",
    "single",
    "warm",
    "lora",
    "other",
]
MARGIN = 0.05  # nats per answer token: methods that differ by less are as good
TUNING_PARTS = 3  # rates are tuned on two parts and compared on the third one
FEWEST_ROWS = 2  # of a fold: one row has no spread
_LEVEL = 0.05  # that any method is out by chance
STEP = 3.0
REACH = 5  # steps of the first rate to both sides
SHORT = 1 / 4  # share of the epochs in which rates are compared first
FINALISTS = {1 / 2: 2, 1.0: 1}  # rates that train for a larger share

Rates = tuple[tuple[str, float], ...]


class Candidate(NamedTuple):
    """Name and value of each rate, and share of the recipe's epochs."""

    rates: Rates
    share: float


class Training(NamedTuple):
    """One training and its test.

    Attributes:
      arm: name of the method.
      draw: number of the random draw of a control.
      rates: name and value of each learning rate, none for methods without rates.
      share: share of the recipe's epochs.
      train: numbers of the training rows, none for methods that do not learn.
      test: numbers of the rows to score.
      answers: answers are generated and scored, in addition to the losses.
    """

    arm: str
    draw: int
    rates: Rates
    share: float
    train: tuple[int, ...]
    test: tuple[int, ...]
    answers: bool = True


class Scores(NamedTuple):
    """Scores of the test rows of a training.

    Attributes:
      loss: minus the log-likelihood of each answer, in nats, divided by the mean number of answer tokens of all rows of
        the task, so that the mean over rows is nats per answer token.
      correct: 1 for answers that match exactly; None if the rows are not answered.
      option_correct: answers that are more likely than the task's other options, if it has options.
      seconds: time that training and test took.
    """

    loss: Float[np.ndarray, " test"]
    correct: Float[np.ndarray, " test"] | None = None
    option_correct: Float[np.ndarray, " test"] | None = None
    seconds: float = 0.0


class TimeIsOver(Exception):
    """A trial is to end with what it has measured."""


Measure = Callable[[Sequence[Training]], Iterable[Scores]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialArm:
    """A method of a trial.

    Attributes:
      name: name in tables.
      rates: learning rates of its recipe; a method without rates is not tuned.
      draw: number of the random draw, of a control.
      learns: True if it uses training rows; without it, one evaluation of all rows is enough.
      role: role in the sentence of the verdict.
      parameters: trained parameters, 0 for none: the cheaper one of two methods that are as good is preferred.
    """

    name: str
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    draw: int = 0
    learns: bool = True
    role: Role = "other"
    parameters: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Outcomes of a task so far.

    Attributes:
      arms: the methods that were measured, in order.
      groups: [rows], number of each row's input.
      fold: [rows], fold that tests each row.
      loss: [rows] of each method, NaN for rows that did not test it.
      correct: [rows] of each method, 1, 0 or NaN.
      option_correct: the same for options, without methods that have no scores of options.
      tuned: best rates and share of the epochs of each method with rates.
      out: methods that are out.
      seconds: time of each method's trainings and tests.
    """

    arms: tuple[TrialArm, ...]
    groups: Int[np.ndarray, " rows"]
    fold: Int[np.ndarray, " rows"]
    loss: dict[str, Float[np.ndarray, " rows"]]
    correct: dict[str, Float[np.ndarray, " rows"]]
    option_correct: dict[str, Float[np.ndarray, " rows"]]
    tuned: dict[str, Candidate]
    out: frozenset[str]
    seconds: dict[str, float]

    def common_rows(self, *names: str) -> Bool[np.ndarray, " rows"]:
        """Return [rows], whether a row tested all of these methods."""
        losses = np.stack([self.loss[name] for name in names])
        return np.all(~np.isnan(losses), axis=0)

    def sample(self, rows: Bool[np.ndarray, " rows"]) -> Sample:
        """Return the sampling of rows, for intervals of differences.

        Folds share most training rows, so their losses are not independent: the variance of the mean over m of k folds
        is multiplied by 1 + m / (k - 1), the correction of Nadeau and Bengio (2003), on rows instead of folds.
        """
        folds = len(np.unique(self.fold))
        measured = len(np.unique(self.fold[rows]))
        return Sample(self.groups[rows], 1 + measured / (folds - 1))

    def is_worse(self, name: str, other: str, level: float) -> bool:
        """Return whether a method's loss is more than the margin above another one's, as far as the rows show."""
        rows = self.common_rows(name, other)
        difference = self.loss[name][rows] - self.loss[other][rows]
        sample = self.sample(rows)
        bound = difference.mean() - sample.reach(level) * sample.error(difference)
        return bool(bound > MARGIN or not np.isfinite(difference).all())


def procedure(
    arms: Sequence[TrialArm],
    groups: Sequence[Hashable],
    measure: Measure,
    *,
    folds: int = 5,
    seed: int = 0,
) -> Iterator[Outcomes]:
    """Yield the outcomes after each round of measurements.

    Args:
      arms: the methods, whose names differ.
      groups: input of each row.
      measure: function that trains and tests, and returns scores in the order of the trainings. It raises `TimeIsOver`
        to end the procedure after what was measured.
      folds: number of folds.
      seed: seed of the folds.

    Raises:
      ValueError: before anything is measured: names are equal, or the rows are too few for the folds.
    """
    names = [arm.name for arm in arms]
    if len({*names}) < len(names):
        raise ValueError(
            f"methods have the same name: {', '.join(names)}: give each its own"
        )
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    cross_validation = divide(groups, folds, seed)
    fold = divide(groups, TUNING_PARTS, seed)
    tuned: dict[str, Candidate] = {}
    out = set[str]()
    seconds = dict.fromkeys(names, 0.0)
    # Loss, exact match and match of options of each row that was tested.
    scores = {name: np.full((3, len(groups)), np.nan) for name in names}

    def outcomes() -> Outcomes:
        tables = {
            name: table.copy()
            for name, table in scores.items()
            if not np.isnan(table[0]).all()
        }
        return Outcomes(
            arms=tuple(arm for arm in arms if arm.name in tables),
            groups=np.array([numbers[group] for group in groups]),
            fold=fold,
            loss={name: table[0] for name, table in tables.items()},
            correct={name: table[1] for name, table in tables.items()},
            option_correct={
                name: table[2]
                for name, table in tables.items()
                if not np.isnan(table[2]).all()
            },
            tuned=dict(tuned),
            out=frozenset(out),
            seconds=dict(seconds),
        )

    def training_of(
        arm: TrialArm, number: int, candidate: Candidate, *, answers: bool = True
    ) -> Training:
        is_tested = fold == number if arm.learns else np.ones(len(fold), bool)
        return Training(
            arm.name,
            arm.draw,
            *candidate,
            train=tuple(np.flatnonzero(~is_tested).tolist()),
            test=tuple(np.flatnonzero(is_tested).tolist()),
            answers=answers,
        )

    def scored(trainings: Sequence[Training]) -> Iterator[tuple[Training, Scores]]:
        for training, result in zip(trainings, measure(trainings), strict=True):
            seconds[training.arm] += result.seconds
            yield training, result

    def record(training: Training, result: Scores) -> None:
        rows = list(training.test)
        table = scores[training.arm]
        # A loss that is not finite is that of a training that diverged, and no missing one.
        table[0, rows] = np.nan_to_num(result.loss, nan=np.inf)
        if result.correct is not None:
            table[1, rows] = result.correct
        if result.option_correct is not None:
            table[2, rows] = result.option_correct

    def test_fold(tested_arms: Sequence[TrialArm], number: int) -> None:
        """Test methods on a fold, at their best rates; those that do not learn on all rows."""
        default = Candidate((), 1.0)
        trainings = [
            training_of(arm, number, tuned.get(arm.name, default))
            for arm in tested_arms
        ]
        for training, result in scored(trainings):
            record(training, result)

    try:
        test_fold([arm for arm in arms if not arm.rates], 0)
        yield outcomes()

        searches = {
            arm.name: halving(tuple(arm.rates.items())) for arm in arms if arm.rates
        }
        stages = {name: next(search) for name, search in searches.items()}
        best_losses = dict.fromkeys(searches, math.inf)
        while stages:
            trainings = [
                training_of(arm, 0, candidate, answers=False)
                for arm in arms
                for candidate in stages.get(arm.name, ())
            ]
            losses = {name: [] for name in stages}
            for training, result in scored(trainings):
                loss = float(np.mean(result.loss))
                loss = loss if math.isfinite(loss) else math.inf
                losses[training.arm].append(loss)
                if loss < best_losses[training.arm] or training.arm not in tuned:
                    best_losses[training.arm] = loss
                    tuned[training.arm] = Candidate(training.rates, training.share)
                    record(training, result)
            stages = {}
            for name, stage_losses in losses.items():
                with contextlib.suppress(StopIteration):
                    stages[name] = searches[name].send(stage_losses)
            yield outcomes()

        # From here on, trainings and outcomes have these folds, and no losses of the thirds.
        fold = cross_validation
        left = [arm for arm in arms if arm.learns]
        for arm in left:
            scores[arm.name][:] = np.nan
        level = _LEVEL / (max(len(arms) - 1, 1) * folds)
        for number in range(folds):
            test_fold(left, number)
            so_far = outcomes()
            yield so_far
            # Methods that are worse than the best one by the margin are out.
            best = best_arm(so_far)
            out |= {
                arm.name
                for arm in so_far.arms
                if arm.name not in out and so_far.is_worse(arm.name, best, level)
            }
            left = [arm for arm in left if arm.name not in out]
    except TimeIsOver:
        yield outcomes()


def halving(
    defaults: Rates,
) -> Generator[list[Candidate], list[float], None]:
    """Yield learning rates and epochs to try by successive halving (Jamieson and Talwalkar, 2016).

    Losses of the candidates are sent back, infinite ones of a training that diverged.

    | stage | rates | share of the epochs |
    |---|---|---:|
    | 1 | the default ones | 1/4 |
    | 2 | the first rate times and divided by 3; further while an end is the best, up to a factor of 243 | 1/4 |
    | 3 | the second rate times and divided by 3 (or half a step of the only one) at the best first rate | 1/4 |
    | 4 | the best two | 1/2 |
    | 5 | the best one | 1 |

    The best one of all these is chosen, with its share of the epochs: with few rows, a LoRA overfits in all of them.
    On the tuning tasks of experiments/pool_value.md, the best rate of magnitudes is 0.003 to 0.01 on one model and 0.03
    to 0.1 on another; that of coefficients is 0.03 on both. So magnitudes come first.
    """
    losses = dict[Candidate, float]()

    def compared(
        rates: list[Rates], share: float
    ) -> Generator[list[Candidate], list[float], None]:
        candidates = [Candidate(rate, share) for rate in rates]
        losses.update(zip(candidates, (yield candidates), strict=True))

    def best(share: float, count: int = 1) -> list[Rates]:
        tried = [candidate for candidate in losses if candidate.share == share]
        return [
            candidate.rates
            for candidate in sorted(tried, key=losses.__getitem__)[:count]
        ]

    yield from compared([defaults], SHORT)
    ends = {-1: defaults, 1: defaults}
    for _ in range(REACH):
        # In the first round the default is both ends.
        sides = [side for side, rates in ends.items() if rates == best(SHORT)[0]]
        if not sides:
            break
        for side in sides:
            ends[side] = _times(ends[side], 0, STEP**side)
        yield from compared([ends[side] for side in sides], SHORT)
    (leader,) = best(SHORT)
    place, step = (1, STEP) if len(defaults) > 1 else (0, math.sqrt(STEP))
    yield from compared(
        [_times(leader, place, 1 / step), _times(leader, place, step)], SHORT
    )
    share_before = SHORT
    for share, count in FINALISTS.items():
        yield from compared(best(share_before, count), share)
        share_before = share


def _times(rates: Rates, place: int, factor: float) -> Rates:
    name, value = rates[place]
    return (*rates[:place], (name, value * factor), *rates[place + 1 :])


def best_arm(outcomes: Outcomes) -> str:
    """Return the method of least loss, other than a control, on the rows that tested all methods that are left."""
    left = [arm for arm in outcomes.arms if arm.name not in outcomes.out]
    rows = outcomes.common_rows(*(arm.name for arm in left))
    candidates = [arm.name for arm in left if arm.role != "control"]
    return min(candidates, key=lambda name: outcomes.loss[name][rows].mean())


def divide(
    groups: Sequence[Hashable], folds: int, seed: int
) -> Int[np.ndarray, " rows"]:
    """Return the fold of each row, from 0. Folds have about the same number of rows, and no input is in two of them.

    Args:
      groups: input of each row.
      folds: number of folds.
      seed: seed of the random order of the inputs.

    Raises:
      ValueError: there are too few inputs or rows.
    """
    if folds < 2:
        raise ValueError(f"--folds is {folds}: give at least 2")
    sizes = Counter(groups)
    fix = f"add rows, or lower --folds (it is {folds})"
    if len(sizes) < folds:
        raise ValueError(
            f"the {len(groups)} rows have {len(sizes)} different inputs, expected at least {folds}, because rows with "
            f"one input stay together: {fix}"
        )
    inputs = list(sizes)
    order = np.random.default_rng([seed, folds]).permutation(len(inputs))
    rows_in = [0] * folds
    fold_of = dict[Hashable, int]()
    for group in sorted(
        (inputs[place] for place in order), key=lambda group: -sizes[group]
    ):
        fold_of[group] = rows_in.index(min(rows_in))
        rows_in[fold_of[group]] += sizes[group]
    if min(rows_in) < FEWEST_ROWS:
        raise ValueError(
            f"{len(groups)} rows give a fold of {min(rows_in)}, expected at least {FEWEST_ROWS}: {fix}"
        )
    return np.array([fold_of[group] for group in groups])
