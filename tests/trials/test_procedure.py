"""Rounds, rates and folds of a trial. Oracles: definitions, and brute force over all rates that may be tried."""

import math

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from refusals import refused

from lorafusion_jax.trials import Scores, TrialArm, procedure
from lorafusion_jax.trials.procedure import STEP, TimeIsOver, divide, halving

_GROUPS = [f"question {number // 2}" for number in range(42)]
_BOTH = {"rates": {"a": 0.1, "b": 0.01}}
_ARMS = [
    TrialArm(name="base", learns=False, role="base"),
    TrialArm(name="examples", role="examples"),
    TrialArm(name="pool", role="pool", **_BOTH),
    TrialArm(name="random", role="control", draw=1, **_BOTH),
    TrialArm(name="LoRA", role="lora", rates={"c": 0.02}),
]


def test_folds_divide_no_input_and_have_equal_sizes():
    fold = divide(_GROUPS, 5, 0)
    assert max(len({*parts}) for parts in np.split(fold, 21)) == 1
    assert sorted(np.bincount(fold)) == [8, 8, 8, 8, 10]
    assert (fold == divide(_GROUPS, 5, 0)).all()
    assert (fold != divide(_GROUPS, 5, 1)).any()
    uneven = divide(["a"] * 20 + [*"bcdefghijk"], 3, 0)
    assert sorted(np.bincount(uneven)) == [5, 5, 20]


@pytest.mark.parametrize(
    ("arms", "groups", "folds", "message"),
    [
        (_ARMS, "aaaaaaaaa", 5, "the 9 rows have 1 different inputs"),
        (_ARMS, "aabbc", 5, r"the 5 rows have 3 different inputs, .* lower --folds"),
        (_ARMS, "abcdefghi", 5, "9 rows give a fold of 1, expected at least 2"),
        (_ARMS, "aabb", 2, "expected at least 3"),
        (_ARMS, "abcdef", 1, "--folds is 1: give at least 2"),
        (_ARMS[:1] * 2, _GROUPS, 5, "same name: base, base"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_training(arms, groups, folds, message):
    with refused(message):
        next(procedure(arms, [*groups], pytest.fail, folds=folds))


def _search(defaults, loss):
    """Return the candidates that halving tries, with their losses."""
    losses = {}
    search = halving(defaults)
    candidates = next(search)
    while True:
        losses |= {candidate: loss(candidate) for candidate in candidates}
        try:
            candidates = search.send([losses[candidate] for candidate in candidates])
        except StopIteration:
            return losses


@pytest.mark.parametrize("powers", [(0, 0), (1, -1), (-2, 1), (5, 0), (-5, 1), (9, 0)])
def test_halving_finds_the_best_rates_of_all_that_it_may_try(powers):
    best = (0.1 * STEP ** powers[0], 0.01 * STEP ** powers[1])

    def loss(candidate):
        pairs = zip(candidate.rates, best, strict=True)
        far = sum(math.log(value / wanted) ** 2 for (_, value), wanted in pairs)
        return far - candidate.share / 1e6

    losses = _search((("a", 0.1), ("b", 0.01)), loss)
    found = min(losses, key=losses.__getitem__)
    reached = 0.1 * STEP ** max(min(powers[0], 5), -5)
    assert found.rates[0][1] == pytest.approx(reached)
    assert found.rates[1][1] == pytest.approx(best[1])
    assert found.share == 1
    # Three rates, one for each further step of a search to an end, two second rates, two halves and a whole training.
    steps = (
        max(min(abs(powers[0]) - 1, 4) + (abs(powers[0]) < 5), 0) if powers[0] else 0
    )
    shares = sum(candidate.share for candidate in losses)
    assert shares == (3 + steps + 2) / 4 + 2 / 2 + 1


def test_one_rate_is_refined_by_half_steps_and_divergence_is_never_chosen():
    def loss(candidate):
        rate = candidate.rates[0][1]
        return math.inf if rate > 0.6 or candidate.share == 1 else abs(math.log(rate))

    losses = _search((("a", 0.3),), loss)
    found = min(losses, key=losses.__getitem__)
    assert found.rates == (("a", pytest.approx(0.3 * STEP**0.5)),)
    assert found.share < 1


class _Measured:
    """Made-up scores: the loss of a method is its own part, how far its rates are from the best, and a row's part."""

    def __init__(self, parts, most=math.inf):
        self.parts = parts
        self.most = most
        self.trainings = []

    def __call__(self, trainings):
        for training in trainings:
            if len(self.trainings) >= self.most:
                raise TimeIsOver
            self.trainings.append(training)
            trained = {_GROUPS[row] for row in training.train}
            assert not trained & {_GROUPS[row] for row in training.test}
            far = sum(abs(math.log(rate / 0.03)) for _, rate in training.rates[:1])
            rng = np.random.default_rng(list(training.test))
            noise = 0.01 * rng.normal(size=len(training.test))
            loss = self.parts.get(training.arm, 1.0) + far / 10 + noise
            correct = (loss < 0.9).astype(float) if training.answers else None
            yield Scores(loss, correct, seconds=2.0)


def test_rounds_train_nothing_first_then_tune_then_test_each_fold():
    measure = _Measured({"pool": 0.5})
    *earlier, last = procedure(_ARMS, _GROUPS, measure)
    first = measure.trainings[:2]
    assert [training.arm for training in first] == ["base", "examples"]
    default = measure.trainings[2:5]
    assert {training.share for training in default} == {1 / 4}
    assert [dict(training.rates) for training in default] == [
        arm.rates for arm in _ARMS[2:]
    ]
    assert not any(training.answers for training in default)
    assert {arm.name for arm in earlier[0].arms} == {"base", "examples"}
    assert {arm.name for arm in earlier[1].arms} == {arm.name for arm in _ARMS}
    # Each row is tested once by each method that is left; only then, answers are generated.
    for name in ("pool", "base"):
        assert (
            np.isfinite(last.loss[name]).all() and np.isfinite(last.correct[name]).all()
        )
    assert_array_equal(last.fold, divide(_GROUPS, 5, 0))
    assert dict(last.tuned["pool"].rates)["a"] == pytest.approx(0.1 / 3)
    assert last.seconds["base"] == 2 and last.seconds["pool"] > 20


def test_a_method_is_out_after_a_fold_that_shows_it_worse_by_the_margin():
    *_, last = procedure(_ARMS, _GROUPS, _Measured({"pool": 0.5, "LoRA": 0.52}))
    assert last.out == {"base", "examples", "random"}
    tested = np.isfinite(last.loss["random"])
    assert_array_equal(tested, last.fold == 0)
    assert np.isfinite(last.loss["LoRA"]).all()


@pytest.mark.parametrize("most", [1, 3, 10, 30])
def test_outcomes_have_what_was_measured_when_time_is_over(most):
    measure = _Measured({"pool": 0.5}, most)
    *_, last = procedure(_ARMS, _GROUPS, measure)
    assert len(measure.trainings) == most
    measured = {training.arm for training in measure.trainings}
    assert last.arms and {arm.name for arm in last.arms} <= measured
    assert all(np.isfinite(losses).any() for losses in last.loss.values())
    assert last.seconds == {
        arm.name: 2.0 * sum(training.arm == arm.name for training in measure.trainings)
        for arm in _ARMS
    }
