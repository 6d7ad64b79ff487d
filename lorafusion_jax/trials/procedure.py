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
    return _Rounds(tuple(arms), list(groups), measure, folds, seed).run()


class _Rounds:
    """Rounds of one task; attributes are those of `Outcomes`, and of `procedure`."""

    def __init__(
        self,
        arms: tuple[TrialArm, ...],
        groups: list[Hashable],
        measure: Measure,
        folds: int,
        seed: int,
    ):
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        self.arms = arms
        self.groups = np.array([numbers[group] for group in groups])
        self.measure = measure
        self.folds = divide(groups, folds, seed)
        self.fold = divide(groups, TUNING_PARTS, seed)
        self.tuned: dict[str, Candidate] = {}
        self.out = frozenset[str]()
        self.seconds = dict.fromkeys([arm.name for arm in arms], 0.0)
        # Loss, exact match and match of options of each row that was tested.
        self.scores = {arm.name: self._empty() for arm in arms}

    def run(self) -> Iterator[Outcomes]:
        """Yield the outcomes after each round, and after the last measurement when time is over."""
        try:
            for _ in self._measured():
                yield self.outcomes()
        except TimeIsOver:
            yield self.outcomes()

    def _measured(self) -> Iterator[None]:
        self._test([arm for arm in self.arms if not arm.rates], 0)
        yield
        yield from self._tune([arm for arm in self.arms if arm.rates])
        self.fold = self.folds
        for arm in self.arms:
            if arm.learns:
                self.scores[arm.name] = self._empty()
        left = self.arms
        for number in range(max(self.folds) + 1):
            self._test([arm for arm in left if arm.learns], number)
            yield
            left = self._left()

    def _tune(self, arms: list[TrialArm]) -> Iterator[None]:
        searches = {arm.name: halving(tuple(arm.rates.items())) for arm in arms}
        stages = {name: next(search) for name, search in searches.items()}
        best = dict.fromkeys(searches, math.inf)
        while stages:
            trainings = [
                self._training(arm, 0, candidate, answers=False)
                for arm in arms
                for candidate in stages.get(arm.name, ())
            ]
            losses = {name: [] for name in stages}
            for training, scores in self._scored(trainings):
                loss = float(np.mean(scores.loss))
                loss = loss if math.isfinite(loss) else math.inf
                losses[training.arm].append(loss)
                if loss < best[training.arm] or training.arm not in self.tuned:
                    best[training.arm] = loss
                    self.tuned[training.arm] = Candidate(training.rates, training.share)
                    self._record(training, scores)
            stages = {}
            for name, stage_losses in losses.items():
                with contextlib.suppress(StopIteration):
                    stages[name] = searches[name].send(stage_losses)
            yield

    def outcomes(self) -> Outcomes:
        """Return the outcomes so far."""
        measured = [
            arm for arm in self.arms if not np.isnan(self.scores[arm.name][0]).all()
        ]
        scores = {arm.name: self.scores[arm.name].copy() for arm in measured}
        return Outcomes(
            arms=tuple(measured),
            groups=self.groups,
            fold=self.fold,
            loss={name: table[0] for name, table in scores.items()},
            correct={name: table[1] for name, table in scores.items()},
            option_correct={
                name: table[2]
                for name, table in scores.items()
                if not np.isnan(table[2]).all()
            },
            tuned=dict(self.tuned),
            out=self.out,
            seconds=dict(self.seconds),
        )

    def _empty(self) -> Float[np.ndarray, "scores rows"]:
        return np.full((3, len(self.groups)), np.nan)

    def _training(
        self, arm: TrialArm, fold: int, candidate: Candidate, *, answers: bool = True
    ) -> Training:
        every = np.arange(len(self.fold))
        train = every[self.fold != fold] if arm.learns else every[:0]
        test = every[self.fold == fold] if arm.learns else every
        return Training(
            arm.name,
            arm.draw,
            *candidate,
            tuple(train.tolist()),
            tuple(test.tolist()),
            answers,
        )

    def _test(self, arms: Sequence[TrialArm], fold: int) -> None:
        """Test methods on a fold, at their best rates; those that do not learn on all rows."""
        trainings = [
            self._training(arm, fold, self.tuned.get(arm.name, Candidate((), 1.0)))
            for arm in arms
        ]
        for training, scores in self._scored(trainings):
            self._record(training, scores)

    def _scored(
        self, trainings: Sequence[Training]
    ) -> Iterator[tuple[Training, Scores]]:
        for training, scores in zip(trainings, self.measure(trainings), strict=True):
            self.seconds[training.arm] += scores.seconds
            yield training, scores

    def _record(self, training: Training, scores: Scores) -> None:
        rows = list(training.test)
        table = self.scores[training.arm]
        # A loss that is not finite is that of a training that diverged, and no missing one.
        table[0, rows] = np.nan_to_num(scores.loss, nan=np.inf)
        if scores.correct is not None:
            table[1, rows] = scores.correct
        if scores.option_correct is not None:
            table[2, rows] = scores.option_correct

    def _left(self) -> list[TrialArm]:
        """Take out what is worse than the best method by the margin, and return the others."""
        outcomes = self.outcomes()
        best = best_arm(outcomes)
        left = [arm for arm in outcomes.arms if arm.name not in self.out]
        rounds = int(max(self.folds)) + 1
        level = _LEVEL / (max(len(self.arms) - 1, 1) * rounds)
        self.out |= {
            arm.name for arm in left if outcomes.is_worse(arm.name, best, level)
        }
        return [arm for arm in left if arm.name not in self.out]


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
