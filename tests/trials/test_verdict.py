"""Sentences of trials on made-up outcomes. Oracles: the rules in words, NumPy, scipy.stats, and a simulation."""

import copy
import dataclasses

import numpy as np
import pytest
from scipy import stats

from lorafusion_jax.report import holm
from lorafusion_jax.trials import Outcomes, TrialArm, judge, judge_tasks
from lorafusion_jax.trials.tuning import Tuned

_ARMS = (
    TrialArm(name="base", role="base", learns=False),
    TrialArm(name="examples", role="examples"),
    TrialArm(name="single", role="single"),
    TrialArm(name="magnitudes", role="magnitudes", parameters=10),
    TrialArm(name="LoRAFusion", role="pool", parameters=12),
    TrialArm(name="rotated modules", role="control", draws=(1, 2, 3), parameters=12),
    TrialArm(name="LoRA", role="lora", parameters=90),
    TrialArm(name="mine", parameters=50),
)
_ROWS = 40
_FOLDS = 5


def _outcomes(spread=0.01, seed=0, rows=_ROWS, groups=None, **means):
    """Return outcomes of arms with the given mean losses, 2 without one; each row adds its own part to all arms."""
    rng = np.random.default_rng(seed)
    of_row = rng.gamma(1.0, size=rows)
    loss = {}
    for arm in _ARMS:
        noise = rng.normal(size=(len(arm.draws), rows))
        noise -= noise.mean(axis=1, keepdims=True)
        loss[arm.name] = means.get(arm.name, 2.0) + of_row + spread * noise
    right = {name: (values < 1).astype(float) for name, values in loss.items()}
    return Outcomes(
        arms=_ARMS,
        groups=np.arange(rows) if groups is None else groups,
        fold=np.arange(rows) % _FOLDS,
        loss=loss,
        correct=right,
        option_correct={name: right[name] for name in ("LoRA", "LoRAFusion")},
        tuned={},
        spent={},
    )


@pytest.mark.parametrize(
    ("means", "arm", "sentence"),
    [
        (
            {"base": 1, "LoRA": 0.98},
            "base",
            "Train nothing: the base alone is as good.",
        ),
        (
            {"examples": 1, "LoRA": 0.98},
            "examples",
            "Train nothing: examples in the prompt are as good.",
        ),
        (
            {"single": 1, "LoRAFusion": 0.97},
            "single",
            "The best single module is as good: no fusion needed.",
        ),
        (
            {"magnitudes": 1, "LoRAFusion": 0.97},
            "magnitudes",
            "Magnitudes alone are as good: no pool needed.",
        ),
        ({"LoRAFusion": 1, "LoRA": 1}, "LoRAFusion", "Use the pool."),
        ({"LoRAFusion": 1, "LoRA": 0.9}, "LoRA", "Train a LoRA."),
        (
            {"rotated modules": 1},
            "rotated modules",
            "Rotated modules are better than the pool's: its content does not help.",
        ),
        ({"mine": 1, "LoRA": 1}, "mine", "Use mine."),
        (
            {"LoRAFusion": 1, "magnitudes": 1.04, "LoRA": 1.01},
            "magnitudes",
            "Magnitudes alone are as good: no pool needed.",
        ),
        ({"LoRAFusion": 1, "magnitudes": 1.06}, "LoRAFusion", "Use the pool."),
    ],
)
def test_the_cheapest_arm_is_named_that_is_as_good_as_the_best(means, arm, sentence):
    found = judge(_outcomes(**means))
    assert (found.decision, found.arm, found.sentence, found.rows) == (
        "named",
        arm,
        sentence,
        None,
    )


def test_a_pool_whose_rotated_modules_are_as_good_is_not_praised_for_its_content():
    notes = judge(_outcomes(LoRAFusion=1, **{"rotated modules": 1.01})).notes
    assert notes == (
        "rotated modules is as good, so it is not the pool's content that helps.",
    )
    assert judge(_outcomes(LoRAFusion=1, **{"rotated modules": 1.2})).notes == ()


def test_the_arm_of_least_loss_is_given_next_to_the_sentence():
    found = judge(_outcomes(magnitudes=1, LoRA=0.98))
    assert found.arm == "magnitudes"
    assert found.least == "Least cross-validated loss: LoRA, 2.138 nats."


def test_an_extended_grid_is_noted_with_both_rates():
    extended = Tuned((("lr_lora", 0.162),), 1.0, "high", (("lr_lora", 0.054),))
    outcomes = dataclasses.replace(_outcomes(LoRA=1), tuned={"LoRA": extended})
    (note,) = judge(outcomes).notes
    both = "lr_lora 0.054 before, 0.16 after. Others beyond it may be better."
    assert (
        note
        == f"The best rate of LoRA was an end of the grid, which was extended once: {both}"
    )


def test_wide_intervals_name_no_arm_but_the_rows_that_would_decide():
    # Of magnitudes and LoRA only; the others are far away. The standard deviation of their difference is 0.6.
    names = dict.fromkeys(
        ("base", "examples", "single", "rotated modules", "mine", "LoRAFusion"), 9.0
    )
    outcomes = _outcomes(0.6 / 2**0.5, seed=1, magnitudes=1.0, LoRA=0.99, **names)
    difference = (outcomes.loss["LoRA"] - outcomes.loss["magnitudes"])[0]
    error = stats.sem(difference) * 1.5  # the square root of 1 + 5 / 4
    found = judge(outcomes)
    bound = stats.t.ppf(0.9, _ROWS - 1) * error
    assert 0.05 < bound < 0.3 and found.decision == "close" and found.arm == "LoRA"
    rows = int(np.ceil(_ROWS * (bound / 0.06) ** 2 / 10) * 10)
    wanted = "No clear winner: LoRA is the best so far, no arm is better by more than 0.3 nats, and about"
    assert (
        found.sentence == f"{wanted} {rows} rows would decide." and found.rows == rows
    )

    wider = dataclasses.replace(
        outcomes, loss={name: 2.5 * values for name, values in outcomes.loss.items()}
    )
    found = judge(wider)
    half = stats.t.ppf(0.975, _ROWS - 1) * 2.5 * error
    rows = int(np.ceil(_ROWS * (2.5 * bound / 0.325) ** 2 / 10) * 10)
    assert (found.decision, found.arm, found.rows) == (
        "more",
        None,
        rows,
    ) and rows > _ROWS
    assert (
        found.sentence
        == f"More rows needed: the interval is ±{half:.2f} nats; about {rows} rows would decide."
    )


def test_contrasts_are_t_intervals_over_inputs_with_holms_p():
    groups = np.repeat(np.arange(20), 2)
    outcomes = _outcomes(0.3, LoRA=1.8, LoRAFusion=1.7, groups=groups)
    found = {contrast.arm: contrast for contrast in judge(outcomes).contrasts}
    assert found.keys() == {arm.name for arm in _ARMS} - {"LoRAFusion"}
    p = {}
    for name, contrast in found.items():
        loss = (
            (outcomes.loss[name].mean(axis=0) - outcomes.loss["LoRAFusion"][0])
            .reshape(20, 2)
            .mean(axis=1)
        )
        right = (
            (outcomes.correct[name].mean(axis=0) - outcomes.correct["LoRAFusion"][0])
            .reshape(20, 2)
            .mean(axis=1)
        )
        p[name] = stats.ttest_1samp(loss * 1.0, 0).statistic / 1.5
        p[name] = 2 * stats.t.sf(abs(p[name]), 19)
        for interval, values in (
            (contrast.loss, loss),
            (contrast.correct, 100 * right),
        ):
            half = stats.t.ppf(0.975, 19) * 1.5 * stats.sem(values)
            np.testing.assert_allclose(
                interval, values.mean() + half * np.array([0, -1, 1]), atol=1e-12
            )
        assert contrast.option_correct == (contrast.correct if name == "LoRA" else None)
    assert [one.p for one in found.values()] == pytest.approx(
        holm([p[name] for name in found])
    )


def test_intervals_of_exact_match_lie_within_100_points():
    outcomes = _outcomes(rows=4)
    outcomes.correct["LoRAFusion"][:] = 1
    outcomes.correct["base"][:] = [0, 0, 0, 1]
    contrast = judge(outcomes).contrasts[0]
    assert (contrast.correct.mean, contrast.correct.low) == (-75, -100)
    assert contrast.correct.high > 0


def _tested(outcomes, folds):
    """Return outcomes whose first folds are tested, of all arms but the first, which needs no training."""
    outcomes = copy.deepcopy(outcomes)
    for arm in _ARMS[1:]:
        for table in (outcomes.loss, outcomes.correct, outcomes.option_correct):
            if arm.name in table:
                table[arm.name][:, outcomes.fold >= folds] = np.nan
    return outcomes


def test_a_trial_that_stopped_is_judged_by_the_rows_that_were_tested():
    outcomes = _tested(_outcomes(0.3, LoRA=1.7), 2)
    (contrast,) = [one for one in judge(outcomes).contrasts if one.arm == "LoRA"]
    values = (outcomes.loss["LoRA"] - outcomes.loss["LoRAFusion"])[0, outcomes.fold < 2]
    half = stats.t.ppf(0.975, 15) * 1.5 * stats.sem(values)
    np.testing.assert_allclose(
        contrast.loss, values.mean() + half * np.array([0, -1, 1])
    )
    p = 2 * stats.t.sf(abs(values.mean()) / stats.sem(values) / 1.5, 15)
    assert contrast.p == pytest.approx(min(1, 7 * p))  # the smallest of seven
    one_input = np.where(outcomes.fold < 2, 0, outcomes.groups)
    found = judge(dataclasses.replace(outcomes, groups=one_input))
    assert found.sentence == "More rows needed."


def test_arms_that_diverged_are_neither_named_nor_compared():
    outcomes = _outcomes(LoRAFusion=1)
    outcomes.loss["LoRAFusion"][0, 3] = np.nan
    outcomes.loss["mine"][0, 0] = -np.inf
    found = judge(outcomes)
    assert found.arm == "base" and found.contrasts == ()
    assert (
        found.notes[0]
        == "LoRAFusion is not compared, because its loss is NaN or infinite."
    )


def test_several_tasks_are_judged_by_their_means():
    tasks = [
        _outcomes(seed=seed, LoRA=1.6 + shift, LoRAFusion=2 + shift)
        for seed, shift in enumerate((0, 0.3, 0.1))
    ]
    found = judge_tasks(tasks)
    assert found.sentence == "Train a LoRA." and found.contrasts[-1].arm == "LoRA"
    np.testing.assert_allclose(found.contrasts[-1].loss, [-0.4] * 3, atol=1e-9)
    stopped = judge_tasks([_tested(task, 2) for task in tasks])
    assert stopped.sentence == "Train a LoRA."
    mixed = judge_tasks(
        [_outcomes(LoRA=1), _outcomes(magnitudes=1), _outcomes(LoRAFusion=1)]
    )
    assert (
        mixed.decision == "more"
        and "tasks would decide" in mixed.sentence
        and mixed.sentence.startswith("More tasks")
    )
    with pytest.raises(
        ValueError,
        match="task 1 has the arms base: give all tasks the arms of the first one",
    ):
        judge_tasks([tasks[0], dataclasses.replace(tasks[1], arms=_ARMS[:1])])
    with pytest.raises(ValueError, match='0 arms have the role "pool"'):
        judge(dataclasses.replace(tasks[0], arms=_ARMS[:1]))


def test_over_many_tasks_a_wrong_arm_is_rarely_named():
    # Differences of heavy-tailed rows whose true means are known; all rows are independent, so bounds are too wide.
    wrong = named = covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        truth = dict(
            zip(
                (arm.name for arm in _ARMS),
                rng.choice([0, 0.1, 0.6], size=len(_ARMS)),
                strict=True,
            )
        )
        outcomes = _outcomes(0.0, seed)
        for arm in _ARMS:
            skewed = rng.gamma(0.5, size=(len(arm.draws), _ROWS)) - 0.5
            outcomes.loss[arm.name] = truth[arm.name] + 0.4 * skewed
        found = judge(outcomes)
        named += found.decision == "named"
        wrong += (
            found.decision == "named" and truth[found.arm] > min(truth.values()) + 0.05
        )
        (one,) = [contrast for contrast in found.contrasts if contrast.arm == "LoRA"]
        covered += one.loss.low <= truth["LoRA"] - truth["LoRAFusion"] <= one.loss.high
    assert wrong <= 10 < named and covered >= 180
