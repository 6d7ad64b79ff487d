"""Means and intervals of right answers. Oracles: NumPy, scipy.stats.bootstrap, closed forms, simulations."""

import numpy as np
import pytest
from refusals import refused
from scipy import stats

from lorafusion_jax.report import holm, over_tasks, paired, summary


def test_means_and_deviation():
    rng = np.random.default_rng(0)
    tasks = [rng.random((5, n)) < 0.4 for n in (30, 200)]
    found = summary(tasks)
    by_seed = (
        tasks[0].mean(1) + tasks[1].mean(1)
    ) / 2  # each task counts the same, however many items it has
    assert found.mean == pytest.approx(100 * by_seed.mean())
    assert found.std == pytest.approx(100 * by_seed.std(ddof=1))
    assert summary(tasks) == found and summary(tasks, seed=1) != found


def test_two_levels_agree_with_a_loop_that_draws_them():
    rng = np.random.default_rng(2)
    tasks = []
    for n in (40, 25):  # items and seeds of unequal difficulty
        chance = rng.uniform(0.3, 0.7, n) + rng.uniform(-0.15, 0.15, (5, 1))
        tasks.append(rng.random((5, n)) < chance)
    means = []
    for _ in range(4000):
        seeds = rng.integers(5, size=5)
        drawn = [
            task[np.ix_(seeds, rng.integers(task.shape[1], size=task.shape[1]))]
            for task in tasks
        ]
        means.append(np.mean([task.mean() for task in drawn]))
    found = summary(tasks)
    assert [found.low, found.high] == pytest.approx(
        100 * np.quantile(means, [0.025, 0.975]), abs=0.6
    )


def test_the_width_has_its_closed_form():
    """Of seeds that agree, only items vary: the normal interval of a proportion."""
    answers = np.tile(np.arange(400) % 4 == 0, (5, 1))
    found = summary([answers])
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400) * 100
    assert [found.low, found.high] == pytest.approx([25 - half, 25 + half], abs=0.3)
    assert found.std == 0
    assert summary([np.zeros((3, 10), bool)]) == (0, 0, 0, 0)
    two = summary([answers, answers])  # each task draws its own items
    assert [two.low, two.high] == pytest.approx(
        [25 - half / 2**0.5, 25 + half / 2**0.5], abs=0.3
    )


def test_pairs_are_drawn_together():
    """Items of very different difficulty widen each interval, but not that of the difference. Oracle: the exact one."""
    rng = np.random.default_rng(4)
    easy = rng.random(200) < 0.5
    b = np.tile(easy, (5, 1))
    a = b.copy()
    a[:, np.flatnonzero(~easy)[:10]] = True  # ten items more, for every seed
    found = paired([a], [b])
    alone = summary([a])
    assert found.difference == pytest.approx(5)
    half = 1.96 * np.sqrt(0.05 * 0.95 / 200) * 100
    assert [found.low, found.high] == pytest.approx([5 - half, 5 + half], abs=0.6)
    assert found.high - found.low < 0.5 * (alone.high - alone.low)
    assert found.p == pytest.approx(2 / 10_001)


def test_equal_methods_have_no_difference_and_one_seed_stands_for_all():
    rng = np.random.default_rng(6)
    a = rng.random((5, 40)) < 0.5
    b = rng.random((1, 40)) < 0.3
    assert paired([a], [a]) == (0, 0, 0, 1)
    won = (np.full((3, 7), True), np.full((3, 10), False))
    lost = (np.full((3, 7), False), np.full((3, 10), True))
    assert paired(won, lost).p == paired(lost, won).p == 1
    assert paired([a], [b]) == paired([a], [np.repeat(b, 5, axis=0)])
    assert summary([a, b]) == summary([a, np.repeat(b, 5, axis=0)])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "no task to summarise"),
        ([(5, 8)], [(5, 8), (5, 8)], "the methods have 1 and 2 tasks"),
        ([(5, 8)], [(5, 1)], "task 0: the methods have 8 and 1 items"),
        ([(5, 8)], [(3, 8)], "the tasks have 3 and 5 seeds"),
        (
            [(0, 8)],
            [(0, 8)],
            r"a task's answers are \[0, 8\]: expected \[seeds, items\]",
        ),
    ],
)
def test_arrays_that_do_not_fit(a, b, message):
    with refused(message):
        paired(
            [np.ones(shape, bool) for shape in a], [np.ones(shape, bool) for shape in b]
        )


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_the_interval_over_tasks_is_students(tasks):
    values = np.random.default_rng(8).normal(3, 5, tasks)
    found = over_tasks([*values])
    oracle = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found is not None
    assert found == pytest.approx((values.mean(), oracle.low, oracle.high), rel=1e-9)
    assert over_tasks([1.0]) is None


def test_holm_rejects_as_his_stepwise_rule_does():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.7]) == [1.0, 1.0] and holm([]) == []
    rng = np.random.default_rng(3)
    for _ in range(100):
        p = rng.beta(0.5, 3, size=6)
        # From the smallest p on, each is compared with 5 % over the number of tests left, until one is not below it.
        below = np.sort(p) <= 0.05 / np.arange(6, 0, -1)
        rejected = np.argsort(p)[: np.argmin(below) if not below.all() else 6]
        assert set(np.flatnonzero(np.array(holm([*p])) <= 0.05)) == set(rejected)
