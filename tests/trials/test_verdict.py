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


_AS_GOOD = "Magnitudes alone are as good: no pool needed."


@pytest.mark.parametrize(
    ("arm", "sentence", "means"),
    [
        ("base", "Train nothing: the base alone is as good.", {"LoRA": 0.98}),
        (
            "examples",
            "Train nothing: examples in the prompt are as good.",
            {"LoRA": 0.98},
        ),
        (
            "single",
            "The best single module is as good: no fusion needed.",
            {"LoRAFusion": 0.97},
        ),
        ("magnitudes", _AS_GOOD, {"LoRAFusion": 0.97}),
        ("magnitudes", _AS_GOOD, {"magnitudes": 1.04, "LoRAFusion": 1, "LoRA": 1.01}),
        ("LoRAFusion", "Use the pool.", {"LoRA": 1}),
        ("LoRAFusion", "Use the pool.", {"magnitudes": 1.06}),
        ("LoRA", "Train a LoRA.", {"LoRA": 0.9, "LoRAFusion": 1}),
        (
            "rotated modules",
            "Rotated modules are better than the pool's: its content does not help.",
            {},
        ),
        ("mine", "Use mine.", {"LoRA": 1}),
    ],
)
def test_the_cheapest_arm_is_named_that_is_as_good_as_the_best(arm, sentence, means):
    verdict = judge(_outcomes(**{arm: 1} | means))
    assert (verdict.decision, verdict.arm, verdict.rows) == ("named", arm, None)
    assert verdict.sentence == sentence


def test_notes_are_on_controls_least_loss_and_extended_grids():
    rotated = judge(_outcomes(LoRAFusion=1, **{"rotated modules": 1.01}))
    assert rotated.notes == (
        "rotated modules is as good, so it is not the pool's content that helps.",
    )
    assert judge(_outcomes(LoRAFusion=1, **{"rotated modules": 1.2})).notes == ()
    verdict = judge(_outcomes(magnitudes=1, LoRA=0.98))
    assert verdict.arm == "magnitudes"
    assert verdict.least == "Least cross-validated loss: LoRA, 2.138 nats."
    extended = Tuned((("lr_lora", 0.162),), 1.0, "high", (("lr_lora", 0.054),))
    outcomes = dataclasses.replace(_outcomes(LoRA=1), tuned={"LoRA": extended})
    (note,) = judge(outcomes).notes
    assert note == (
        "The best rate of LoRA was an end of the grid, which was extended once: "
        "lr_lora 0.054 before, 0.16 after. Others beyond it may be better."
    )


def _interval(values, coverage=0.95):
    """Return mean, ends and p of a t interval whose variance is multiplied by 1 + 5 / 4, of five folds."""
    error = 1.5 * stats.sem(values)
    half = stats.t.ppf(0.5 + coverage / 2, len(values) - 1) * error
    p = 2 * stats.t.sf(abs(values.mean()) / error, len(values) - 1)
    return values.mean() + half * np.array([0, -1, 1]), p


def test_wide_intervals_name_no_arm_but_the_rows_that_would_decide():
    # Of magnitudes and LoRA only; the others are far away. The standard deviation of their difference is 0.6.
    far = {arm.name: 9.0 for arm in _ARMS if arm.name not in ("magnitudes", "LoRA")}
    outcomes = _outcomes(0.6 / 2**0.5, seed=1, magnitudes=1.0, LoRA=0.99, **far)
    difference = (outcomes.loss["LoRA"] - outcomes.loss["magnitudes"])[0]
    verdict = judge(outcomes)
    bound = stats.t.ppf(0.9, _ROWS - 1) * 1.5 * stats.sem(difference)
    rows = int(np.ceil(_ROWS * (bound / 0.06) ** 2 / 10) * 10)
    assert (verdict.decision, verdict.arm, verdict.rows) == ("close", "LoRA", rows)
    assert verdict.sentence == (
        "No clear winner: LoRA is the best so far, no arm is better by more than 0.3 nats, and about "
        f"{rows} rows would decide."
    )
    wider = {name: 2.5 * values for name, values in outcomes.loss.items()}
    verdict = judge(dataclasses.replace(outcomes, loss=wider))
    (mean, low, _), _ = _interval(2.5 * difference)
    rows = int(np.ceil(_ROWS * (2.5 * bound / 0.325) ** 2 / 10) * 10)
    assert (verdict.decision, verdict.arm, verdict.rows) == ("more", None, rows)
    assert verdict.sentence == (
        f"More rows needed: the interval is ±{mean - low:.2f} nats; about {rows} rows would decide."
    )


def test_contrasts_are_t_intervals_over_inputs_with_holms_p():
    groups = np.repeat(np.arange(20), 2)
    outcomes = _outcomes(0.3, LoRA=1.8, LoRAFusion=1.7, groups=groups)
    outcomes.correct["base"][0, :2] = 1
    contrasts = {contrast.arm: contrast for contrast in judge(outcomes).contrasts}
    assert contrasts.keys() == {arm.name for arm in _ARMS} - {"LoRAFusion"}

    def difference(table, name):
        of_rows = table[name].mean(axis=0) - table["LoRAFusion"][0]
        return of_rows.reshape(20, 2).mean(axis=1)

    p = []
    for name, contrast in contrasts.items():
        interval, p_of_arm = _interval(difference(outcomes.loss, name))
        np.testing.assert_allclose(contrast.loss, interval, atol=1e-12)
        p.append(p_of_arm)
        matches = 100 * difference(outcomes.correct, name)
        if matches.any():
            interval, _ = _interval(matches)
            np.testing.assert_allclose(contrast.correct, interval, atol=1e-12)
        options = contrast.correct if name == "LoRA" else None
        assert contrast.option_correct == options
    assert [contrast.p for contrast in contrasts.values()] == pytest.approx(holm(p))


def _stopped(outcomes):
    """Return outcomes of which two folds are tested, of all arms but the first, which needs no training."""
    outcomes = copy.deepcopy(outcomes)
    for arm in _ARMS[1:]:
        for table in (outcomes.loss, outcomes.correct, outcomes.option_correct):
            if arm.name in table:
                table[arm.name][:, outcomes.fold >= 2] = np.nan
    return outcomes


def test_a_trial_that_stopped_is_judged_by_the_rows_that_were_tested():
    outcomes = _stopped(_outcomes(0.3, LoRA=1.7))
    (contrast,) = [one for one in judge(outcomes).contrasts if one.arm == "LoRA"]
    difference = (outcomes.loss["LoRA"] - outcomes.loss["LoRAFusion"])[0]
    interval, p = _interval(difference[outcomes.fold < 2])
    np.testing.assert_allclose(contrast.loss, interval)
    assert contrast.p == pytest.approx(min(1, 7 * p))  # the smallest of seven
    one_input = np.where(outcomes.fold < 2, 0, outcomes.groups)
    verdict = judge(dataclasses.replace(outcomes, groups=one_input))
    assert verdict.sentence == "More rows needed."


def test_arms_that_diverged_are_neither_named_nor_compared():
    outcomes = _outcomes(LoRAFusion=1)
    outcomes.loss["LoRAFusion"][0, 3] = np.nan
    outcomes.loss["mine"][0, 0] = -np.inf
    verdict = judge(outcomes)
    assert verdict.arm == "base" and verdict.contrasts == ()
    note = "LoRAFusion is not compared, because its loss is NaN or infinite."
    assert verdict.notes[0] == note


def test_several_tasks_are_judged_by_their_means():
    tasks = [
        _outcomes(seed=seed, LoRA=1.6 + shift, LoRAFusion=2 + shift)
        for seed, shift in enumerate((0, 0.3, 0.1))
    ]
    verdict = judge_tasks(tasks)
    assert verdict.sentence == "Train a LoRA." and verdict.contrasts[-1].arm == "LoRA"
    np.testing.assert_allclose(verdict.contrasts[-1].loss, [-0.4] * 3, atol=1e-9)
    assert judge_tasks([*map(_stopped, tasks)]).sentence == "Train a LoRA."
    best = [{name: 1} for name in ("LoRA", "magnitudes", "LoRAFusion")]
    mixed = judge_tasks([_outcomes(**means) for means in best])
    assert mixed.decision == "more" and mixed.sentence.startswith("More tasks")
    few = dataclasses.replace(tasks[0], arms=_ARMS[:1])
    with pytest.raises(ValueError, match="task 1 has the arms base: give all tasks"):
        judge_tasks([tasks[0], few])
    with pytest.raises(ValueError, match='0 arms have the role "pool"'):
        judge(few)
