"""Sentences of trials on made-up outcomes. Oracles: the rules in words, and scipy.stats."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from refusals import refused
from scipy import stats

from lorafusion_jax.trials import Outcomes, TrialArm, judge, judge_tasks

_ARMS = (
    TrialArm(name="base", role="base", learns=False),
    TrialArm(name="examples", role="examples"),
    TrialArm(name="nearest", role="single"),
    TrialArm(name="magnitudes", role="magnitudes", parameters=10),
    TrialArm(name="LoRAFusion", role="pool", parameters=12),
    TrialArm(name="random", role="control", parameters=12),
    TrialArm(name="LoRA", role="lora", parameters=90),
    TrialArm(name="further", role="warm", parameters=90),
    TrialArm(name="mine", parameters=50),
)
_ROWS = 40


def _outcomes(spread=0.01, seed=0, groups=None, out=(), **means):
    """Return outcomes of methods with the given mean losses, 2 without one; each row adds its own part to all."""
    rng = np.random.default_rng(seed)
    row_parts = rng.gamma(1.0, size=_ROWS)
    loss = {}
    for arm in _ARMS:
        noise = rng.normal(size=_ROWS)
        noise -= noise.mean()
        loss[arm.name] = means.get(arm.name, 2.0) + row_parts + spread * noise
    return Outcomes(
        arms=_ARMS,
        groups=np.arange(_ROWS) if groups is None else groups,
        fold=np.arange(_ROWS) % 5,
        loss=loss,
        correct={name: (values < 1).astype(float) for name, values in loss.items()},
        option_correct={},
        tuned={},
        out=frozenset(out),
        seconds={},
    )


_AS_GOOD = "Magnitudes alone are as good: no pool needed."


@pytest.mark.parametrize(
    ("arm", "sentence", "means"),
    [
        ("base", "Train nothing: the base alone is as good.", {"LoRA": 0.98}),
        ("examples", "Train nothing: examples in the prompt are", {"LoRA": 0.98}),
        ("nearest", "The nearest adapter is as good as it is", {"LoRAFusion": 0.97}),
        ("magnitudes", _AS_GOOD, {"LoRAFusion": 0.97}),
        ("magnitudes", _AS_GOOD, {"magnitudes": 1.04, "LoRAFusion": 1, "LoRA": 1.01}),
        ("LoRAFusion", "Use the pool: train LoRAFusion.", {"LoRA": 1}),
        ("LoRAFusion", "Use the pool: train LoRAFusion.", {"magnitudes": 1.06}),
        ("LoRA", "Train a LoRA.", {"LoRA": 0.9, "LoRAFusion": 1}),
        ("further", "Train the nearest adapter further.", {"LoRA": 1.2}),
        ("random", "Random adapters are as good as the pool's", {}),
        ("mine", "Use mine.", {"LoRA": 1}),
    ],
)
def test_the_cheapest_method_is_named_that_is_as_good_as_the_best(arm, sentence, means):
    verdict = judge(_outcomes(**{arm: 1} | means))
    assert (verdict.is_named, verdict.arm, verdict.rows) == (True, arm, None)
    assert verdict.sentence.startswith(sentence)
    assert "Least cross-validated loss: " in verdict.sentence


def test_a_control_that_is_as_good_is_mentioned():
    text = "Random adapters are not clearly worse"
    assert text in judge(_outcomes(0.1, LoRAFusion=1, random=1.01)).sentence
    assert text not in judge(_outcomes(0.1, LoRAFusion=1, random=1.5)).sentence


def test_methods_that_cannot_be_told_apart_are_listed_with_the_rows_that_would_do():
    # Of magnitudes and LoRA only; the others are far away. The standard deviation of their difference is 0.6.
    far = {arm.name: 9.0 for arm in _ARMS if arm.name not in ("magnitudes", "LoRA")}
    outcomes = _outcomes(0.6 / 2**0.5, seed=1, magnitudes=1.0, LoRA=0.99, **far)
    difference = outcomes.loss["LoRA"] - outcomes.loss["magnitudes"]
    # The variance of five folds is multiplied by 1 + 5 / 4.
    bound = stats.t.ppf(0.9, _ROWS - 1) * 1.5 * stats.sem(difference)
    rows = int(np.ceil(_ROWS * (bound / 0.06) ** 2 / 10) * 10)
    verdict = judge(outcomes)
    assert (verdict.is_named, verdict.arm, verdict.rows) == (False, "LoRA", rows)
    assert verdict.sentence.startswith(
        f"magnitudes and LoRA cannot be told apart with 40 rows; about {rows} would do. Out: base, examples, nearest, "
        "LoRAFusion, random, further and mine. Least cross-validated loss: LoRA, "
    )


def test_intervals_are_t_intervals_over_inputs_of_the_rows_that_tested_both():
    groups = np.repeat(np.arange(20), 2)
    outcomes = _outcomes(0.3, LoRA=1.5, LoRAFusion=1.7, groups=groups, out=["base"])
    outcomes.loss["base"][outcomes.fold > 1] = np.nan
    verdict = judge(outcomes)
    assert verdict.behind.keys() == {arm.name for arm in _ARMS} - {"LoRA"}
    difference = outcomes.loss["LoRAFusion"] - outcomes.loss["LoRA"]
    by_input = difference.reshape(20, 2).mean(axis=1)
    error = 1.5 * stats.sem(by_input)
    half = stats.t.ppf(0.975, 19) * error
    mean = by_input.mean()
    interval = verdict.behind["LoRAFusion"]
    assert_allclose(interval, [mean, mean - half, mean + half])
    # A method that is out is as far from the best one as on the rows that tested it.
    tested = outcomes.fold < 2
    shift = (outcomes.loss["base"] - outcomes.loss["LoRA"])[tested].mean()
    assert verdict.behind["base"].mean == pytest.approx(shift)
    assert verdict.loss["base"] == pytest.approx(verdict.loss["LoRA"] + shift)


def test_methods_that_diverged_are_neither_named_nor_compared():
    outcomes = _outcomes(LoRAFusion=1)
    outcomes.loss["LoRAFusion"][3] = np.inf
    verdict = judge(outcomes)
    assert verdict.arm == "base" and "LoRAFusion" not in verdict.behind
    broken = {name: values + np.inf for name, values in outcomes.loss.items()}
    with refused("every method is NaN or infinite"):
        judge(replace(outcomes, loss=broken))


def test_several_tasks_are_judged_by_their_means():
    tasks = [
        _outcomes(seed=seed, LoRA=1.6 + shift, LoRAFusion=2 + shift)
        for seed, shift in enumerate((0, 0.3, 0.1))
    ]
    verdict = judge_tasks(tasks)
    assert verdict.sentence.startswith("Train a LoRA.")
    assert_allclose(verdict.behind["LoRAFusion"], [0.4] * 3, atol=1e-9)
    best = [{name: 1} for name in ("LoRA", "magnitudes", "LoRAFusion")]
    mixed = judge_tasks([_outcomes(**means) for means in best])
    assert not mixed.is_named and "told apart with 3 tasks" in mixed.sentence
    few = replace(tasks[0], arms=_ARMS[:1], loss={"x": tasks[0].loss["base"]})
    few = replace(few, arms=(TrialArm(name="x"),))
    with refused("no method was measured on all tasks"):
        judge_tasks([tasks[0], few])
