"""Procedure of a trial: tune the rates of each arm, then cross-validate all arms on the same folds."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from .tuning import Candidate, Rates, Tuned, tune

TUNING_PARTS = 3  # rates are tuned on two parts and compared on the third one
FEWEST_ROWS = 2  # of a part: one row has no spread

Role = Literal[
    "base", "examples", "magnitudes", "pool", "control", "single", "lora", "other"
]


class Training(NamedTuple):
    """One training and its test.

    Attributes:
      arm: name of the arm.
      draw: number of the random draw of a control.
      rates: name and value of each learning rate, none for arms without rates.
      share: share of the recipe's epochs.
      train: numbers of the training rows, none for arms that do not learn.
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
      correct: answers that match exactly; None if the rows are not answered.
      option_correct: answers that are more likely than the task's other options, if it has options.
    """

    loss: Float[np.ndarray, " test"]
    correct: Bool[np.ndarray, " test"] | None = None
    option_correct: Bool[np.ndarray, " test"] | None = None


_UNTUNED = Tuned((), 1.0)  # of an arm without rates
Measure = Callable[[Sequence[Training]], Iterable[Scores]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialArm:
    """An arm of a trial.

    Attributes:
      name: name in tables.
      rates: learning rates of its recipe; an arm without rates is not tuned.
      draws: numbers of the random draws, of a control.
      learns: True if it uses training rows; without it, one evaluation of all rows is enough.
      role: role in the sentence of the verdict.
      parameters: trained parameters, 0 for none: the cheaper one of two arms that are as good is preferred.
    """

    name: str
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    draws: tuple[int, ...] = (0,)
    learns: bool = True
    role: Role = "other"
    parameters: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Outcomes of a task.

    Attributes:
      arms: the arms, in order.
      groups: [rows], number of each row's input.
      fold: [rows], fold that tests each row.
      loss: [draws, rows] of each arm, NaN for rows of folds that were not tested.
      correct: [draws, rows] of each arm, 1, 0 or NaN.
      option_correct: the same for options, without arms that have no scores of options.
      tuned: rates and share of the epochs of each tuned arm, for a training on all rows.
      spent: trained steps of each arm, in trainings on all rows.
    """

    arms: tuple[TrialArm, ...]
    groups: Int[np.ndarray, " rows"]
    fold: Int[np.ndarray, " rows"]
    loss: dict[str, Float[np.ndarray, "_draws rows"]]
    correct: dict[str, Float[np.ndarray, "_draws rows"]]
    option_correct: dict[str, Float[np.ndarray, "_draws rows"]]
    tuned: dict[str, Tuned]
    spent: dict[str, float]


def procedure(
    arms: Sequence[TrialArm],
    groups: Sequence[Hashable],
    measure: Measure,
    *,
    folds: int = 5,
    nested: bool = False,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
) -> Outcomes:
    """Tune each arm, cross-validate all arms, and return the outcomes.

    Rates are tuned once, on an inner split of all rows, of a control on its first draw.

    Args:
      arms: the arms, whose names differ.
      groups: input of each row.
      measure: function that trains and tests, and returns scores in the order of the trainings.
      folds: number of folds.
      nested: tune the rates also inside each fold, for its test.
      seed: seed of the folds.
      stop: function that is called after each fold, and returns whether to leave out the others. With it folds are
        tested one after the other, else arms are.

    Raises:
      ValueError: before anything is measured: names of arms are equal, or the rows are too few for the folds.
    """
    if len({arm.name for arm in arms}) < len(arms):
        raise ValueError(
            f"arms have the same name: {', '.join(arm.name for arm in arms)}: give each its own"
        )
    groups = list(groups)
    fold = divide(groups, folds, (seed,))
    every = tuple(range(len(groups)))
    training_rows = [
        tuple(row for row in every if fold[row] != number) for number in range(folds)
    ]
    tuning_rows = [every, *(training_rows if nested else ())]
    splits = [
        _split(rows, groups, (seed, number)) for number, rows in enumerate(tuning_rows)
    ]
    spent = {arm.name: 0.0 for arm in arms}

    def counted(trainings: Sequence[Training]) -> Iterator[Scores]:
        for training, scores in zip(trainings, measure(trainings), strict=True):
            spent[training.arm] += training.share * len(training.train) / len(every)
            yield scores

    tuned = _tuned(arms, splits, counted)

    def trainings(numbers: Sequence[int]) -> Iterator[Training]:
        """Yield the trainings that folds test; those of an arm and a draw are neighbours."""
        for arm, draw in (
            (arm_to_draw, draw) for arm_to_draw in arms for draw in arm_to_draw.draws
        ):
            for number in numbers:
                best = tuned[arm.name][(1 + number) % len(splits)]
                if arm.learns:
                    train = training_rows[number]
                    test = tuple(row for row in every if fold[row] == number)
                    yield Training(arm.name, draw, *best[:2], train, test)
                elif number == 0:
                    yield Training(arm.name, draw, *best[:2], (), every)

    def empty() -> dict[str, Float[np.ndarray, "_draws rows"]]:
        return {arm.name: np.full((len(arm.draws), len(every)), np.nan) for arm in arms}

    loss = empty()
    correct = empty()
    option_correct = empty()
    draws = {arm.name: arm.draws for arm in arms}
    at_once = [[number] for number in range(folds)] if stop else [[*range(folds)]]
    for numbers in at_once:
        tested = [*trainings(numbers)]
        for training, scores in zip(tested, counted(tested), strict=True):
            place = draws[training.arm].index(training.draw), list(training.test)
            loss[training.arm][place] = scores.loss
            correct[training.arm][place] = scores.correct
            if scores.option_correct is not None:
                option_correct[training.arm][place] = scores.option_correct
        if stop is not None and stop():
            break
    number_of = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return Outcomes(
        arms=tuple(arms),
        groups=np.array([number_of[group] for group in groups]),
        fold=fold,
        loss=loss,
        correct=correct,
        option_correct={
            name: values
            for name, values in option_correct.items()
            if not np.isnan(values).all()
        },
        tuned={arm.name: tuned[arm.name][0] for arm in arms if arm.rates},
        spent=spent,
    )


def _tuned(
    arms: Sequence[TrialArm],
    splits: list[tuple[tuple[int, ...], ...]],
    measure: Measure,
) -> dict[str, list[Tuned]]:
    """Return the best rates of each arm on each split into rows to train on and to compare on."""
    problems = [(arm, split) for arm in arms if arm.rates for split in splits]

    def losses(candidates: list[Candidate]) -> list[float]:
        trainings = []
        for candidate in candidates:
            arm, (train, test) = problems[candidate.problem]
            of_rates = (candidate.rates, candidate.share)
            trainings.append(
                Training(arm.name, arm.draws[0], *of_rates, train, test, answers=False)
            )
        return [float(np.mean(scores.loss)) for scores in measure(trainings)]

    found = tune(
        [tuple(arm.rates.items()) for arm, _ in problems],
        [arm.name for arm, _ in problems],
        losses,
    )
    losses_by_arm = {
        arm.name: [] if arm.rates else [_UNTUNED] * len(splits) for arm in arms
    }
    for (arm, _), tuned in zip(problems, found, strict=True):
        losses_by_arm[arm.name].append(tuned)
    return losses_by_arm


def _split(
    rows: tuple[int, ...], groups: list[Hashable], key: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """Return training and test rows for tuning."""
    part = divide([groups[row] for row in rows], TUNING_PARTS, key)
    pairs = list(zip(rows, part, strict=True))
    return tuple(row for row, part in pairs if part > 0), tuple(
        row for row, part in pairs if part == 0
    )


def divide(
    groups: Sequence[Hashable], parts: int, key: Sequence[int]
) -> Int[np.ndarray, " rows"]:
    """Return the part of each row, from 0; rows with the same input are never divided between two parts.

    Parts have about the same number of rows.

    Args:
      groups: input of each row.
      parts: number of parts.
      key: integers that the random order of the inputs depends on.

    Raises:
      ValueError: there are too few inputs or rows.
    """
    if parts < 2:
        raise ValueError(
            f"rows cannot be divided into {parts} parts: give at least 2 folds"
        )
    sizes = Counter(groups)
    fewer = f", or lower --folds (it is {parts})" if parts > TUNING_PARTS else ""
    if len(sizes) < parts:
        folds = (
            "all have the same input"
            if len(sizes) == 1
            else f"have {len(sizes)} different inputs"
        )
        raise ValueError(
            f"the {len(groups)} rows {folds}, expected at least {parts}, because rows with one input stay together: "
            f"add rows with other inputs{fewer}"
        )
    inputs = list(sizes)
    order = np.random.default_rng([*key, parts]).permutation(len(inputs))
    rows_in = [0] * parts
    part_of = dict[Hashable, int]()
    for group in sorted(
        (inputs[place] for place in order), key=lambda group: -sizes[group]
    ):
        part_of[group] = rows_in.index(min(rows_in))
        rows_in[part_of[group]] += sizes[group]
    if min(rows_in) < FEWEST_ROWS:
        raise ValueError(
            f"{len(groups)} rows give a fold of {min(rows_in)}, expected at least {FEWEST_ROWS} in each of {parts}: "
            f"add rows{fewer}"
        )
    return np.array([part_of[group] for group in groups])
