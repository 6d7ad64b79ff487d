"""Folds, tuning and cross-validation of a trial. Oracles: definitions, and brute force over all rates."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from lorafusion_jax.trials import Scores, Training, TrialArm, procedure
from lorafusion_jax.trials.procedure import divide
from lorafusion_jax.trials.tuning import tune

_TUNING = 5.75  # full trainings that the tuning of an arm is worth
_GROUPS = [f"question {number // 2}" for number in range(42)]
_ARMS = [
    TrialArm(name="base", learns=False, role="base"),
    TrialArm(name="pool", rates={"a": 0.1, "b": 0.01}, role="pool"),
    TrialArm(
        name="rotated", rates={"a": 0.1, "b": 0.01}, draws=(1, 2, 3), role="control"
    ),
]


def test_folds_divide_no_input_and_have_equal_sizes():
    fold = divide(_GROUPS, 5, (0,))
    assert max(len({*parts}) for parts in np.split(fold, 21)) == 1
    assert sorted(np.bincount(fold)) == [8, 8, 8, 8, 10]
    assert (fold == divide(_GROUPS, 5, (0,))).all() and (
        fold != divide(_GROUPS, 5, (1,))
    ).any()
    assert sorted(np.bincount(divide(["a"] * 20 + [*"bcdefghijk"], 3, (0,)))) == [
        5,
        5,
        20,
    ]


@pytest.mark.parametrize(
    ("arms", "groups", "folds", "message"),
    [
        (
            _ARMS,
            "aaaaaaaaa",
            5,
            "the 9 rows all have the same input, expected at least 5",
        ),
        (_ARMS, "aabbc", 5, r"the 5 rows have 3 different inputs, .* lower --folds"),
        (_ARMS, "abcdefghi", 5, "9 rows give a fold of 1, expected at least 2 in each"),
        (_ARMS, "aabb", 2, "expected at least 3, .* add rows with other inputs$"),
        (_ARMS, "abcdef", 1, "rows cannot be divided into 1 parts: give at least 2"),
        (_ARMS[:1] * 2, _GROUPS, 5, "same name: base, base"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_training(arms, groups, folds, message):
    with pytest.raises(ValueError, match=message):
        procedure(arms, [*groups], pytest.fail, folds=folds)


@pytest.mark.parametrize(
    "best",
    [
        (0.0001, 0.01),
        (0.001, 0.0003),
        (0.1, 0.01),
        (0.3, 0.01),
        (0.03, 0.03),
        (2.7, 0.27),
        (9.0, 0.03),
    ],
)
def test_halving_finds_the_best_rates_of_all_that_it_may_try(best):
    losses = []

    def loss(rates):
        return sum(
            math.log(value / wanted) ** 2
            for (_, value), wanted in zip(rates, best, strict=True)
        )

    def evaluate(candidates):
        losses.extend((loss(one.rates), one.share) for one in candidates)
        return [
            math.nan if one.rates[0][1] > 2.71 else loss(one.rates) - one.share / 1e6
            for one in candidates
        ]

    (found,) = tune([(("a", 0.1), ("b", 0.01))], ["pool"], evaluate)
    grid = [
        (0.1 * 3.0**power, 0.01 * factor)
        for power in range(-3, 4)
        for factor in (1 / 3, 1, 3)
    ]
    # An end of the seven rates is extended by two further ones, at the best second rate.
    if end := {0.0001: 0.1 / 27, 0.001: 0.1 / 27, 2.7: 2.7, 9.0: 2.7}.get(best[0]):
        seconds = [b for a, b in grid if a == pytest.approx(end)]
        second = min(seconds, key=lambda b: abs(math.log(b / best[1])))
        further = (1 / 3, 1 / 9) if end < 0.1 else (3, 9)
        grid += [(end * factor, second) for factor in further]
    oracle = min(loss((("a", a), ("b", b))) for a, b in grid if a < 2.71)
    assert sum(share for _, share in losses) == _TUNING + (2 if end else 0)
    assert found.share == 1 and loss(found.rates) == pytest.approx(oracle)
    assert found.edge == ("low" if best[0] == 0.0001 else None)
    before = None if found.in_grid is None else found.in_grid[0][1]
    assert before == (pytest.approx(end) if end else None)


def test_one_rate_is_refined_by_half_steps_and_diverged_ends_are_not_chosen():
    def evaluate(candidates, last):
        return [
            abs(math.log(one.rates[0][1])) if one.share < 1 else last
            for one in candidates
        ]

    for last, share in ((0.0, 1.0), (1.0, 0.5), (math.inf, 0.5)):
        (found,) = tune(
            [(("a", 0.55),)],
            ["LoRA"],
            lambda candidates, last=last: evaluate(candidates, last),
        )
        assert found[:2] == ((("a", pytest.approx(0.55 * 3**0.5)),), share)
    with pytest.raises(
        ValueError,
        match="LoRA: the loss is NaN or infinite at all rates within a factor of 27 of a",
    ):
        tune(
            [(("a", 0.55),)], ["LoRA"], lambda candidates: [math.nan] * len(candidates)
        )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("stop_after", [None, 2, 5])
def test_each_row_is_tested_by_a_training_without_its_input(nested, stop_after):
    calls: list[Sequence[Training]] = []

    def measure(trainings):
        calls.append(trainings)
        for training in trainings:
            trained = {_GROUPS[row] for row in training.train}
            assert not trained & {_GROUPS[row] for row in training.test}
            # With the first rows, the best rates are others than with the last ones.
            best = 0.3 if 0 in training.train else 0.03
            far = sum(abs(math.log(value / best)) for _, value in training.rates[:1])
            far -= len(training.rates) * training.share / 1e6
            loss = far + training.draw + np.array(training.test) / 100
            yield Scores(loss, loss > 1)

    def stop():
        return len(calls) == 3 + stop_after

    last = procedure(
        _ARMS, _GROUPS, measure, nested=nested, stop=stop if stop_after else None
    )
    assert len(calls) == 3 + (stop_after or 1)
    tested = np.isfinite(last.loss["pool"][0])
    np.testing.assert_array_equal(tested, last.fold < (stop_after or 5))
    if stop_after == 2:
        return
    np.testing.assert_allclose(last.loss["base"][0], np.arange(42) / 100)
    drawn = last.loss["rotated"] - last.loss["pool"]
    np.testing.assert_allclose(
        drawn, np.broadcast_to([[1], [2], [3]], (3, 42)), atol=1e-9
    )
    tuned = _TUNING * 28 / 42
    if nested:
        sizes = np.bincount(last.fold)
        tuned += _TUNING * sum(round((42 - n) * 2 / 3) for n in sizes) / 42
    assert last.spent["base"] == 0
    assert last.spent["pool"] == pytest.approx(4 + tuned, rel=0.04)
    assert last.spent["rotated"] - last.spent["pool"] == pytest.approx(8)
    rates = {
        dict(training.rates)["a"]
        for training in calls[-1]
        if training.arm == "pool" and training.share == 1
    }
    assert len(rates) == 1 or nested
    assert last.tuned["pool"] == last.tuned["rotated"] and last.option_correct == {}
