"""Means of right answers with their uncertainty: over seeds, which a method was run with, and over test items.

All seeds answer the same items, so a resample draws seeds, then items, and crosses the two (Owen, *The pigeonhole
bootstrap*, 2007). A seed is drawn for all tasks at once; each task draws its items separately. Intervals are
percentiles. From few seeds they are somewhat too narrow; where every answer is right, or every one wrong, they have no
width. All of this holds for the tasks, training rows, pool and random modules that were run; `over_tasks` estimates
from the tasks alone how far a difference carries over to other tasks.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

_RESAMPLES = 10_000
_CHUNK = 1_000  # resamples drawn at a time: memory
_TAILS = (0.025, 0.975)


class Summary(NamedTuple):
    """Percent of right answers, mean of the tasks, with the ends of its 95 % interval."""

    mean: float
    std: (
        float | None
    )  # of the seeds' means, one degree of freedom less; None for a single seed
    low: float
    high: float


class Paired(NamedTuple):
    """The first method minus the second, in percentage points, with its 95 % interval and two-sided p."""

    difference: float
    low: float
    high: float
    p: float


class Interval(NamedTuple):
    """Mean with the ends of its interval."""

    mean: float
    low: float
    high: float


class Sample(NamedTuple):
    """Units of a random sample, such as tasks, or rows of a task, whose means have t intervals.

    Attributes:
      groups: number of each unit's group; units of one group count as one.
      inflation: factor of the variance of the mean, for units that are not independent.
    """

    groups: Int[np.ndarray, " units"]
    inflation: float = 1.0

    @property
    def freedom(self) -> int:
        """Degrees of freedom."""
        return len(np.unique(self.groups)) - 1

    def error(self, values: Float[np.ndarray, "... units"]) -> Float[np.ndarray, "..."]:
        """Return the standard error of the mean, infinite for a single group."""
        if self.freedom < 1:
            return np.full(values.shape[:-1], np.inf)
        groups, group_of_value = np.unique(self.groups, return_inverse=True)
        residuals = values - values.mean(axis=-1, keepdims=True)
        sums = residuals @ np.eye(len(groups))[group_of_value]
        squares = np.sum(sums**2, axis=-1) / len(self.groups) ** 2
        variance = squares * len(groups) / self.freedom
        return np.asarray(np.sqrt(self.inflation * variance))

    def reach(self, alpha: float) -> float:
        """Return how many standard errors away a one-sided bound is that fails with probability alpha."""
        from scipy.special import stdtrit

        return float(stdtrit(max(self.freedom, 1), 1 - alpha))

    def interval(
        self, values: Float[np.ndarray, " units"], most: float = np.inf
    ) -> Interval:
        """Return the mean with its 95 % interval, within the values that are possible: -most to most."""
        mean = float(values.mean())
        half = self.reach(_TAILS[0]) * float(self.error(values))
        return Interval(mean, max(mean - half, -most), min(mean + half, most))

    def p(self, values: Float[np.ndarray, " units"]) -> float:
        """Return the two-sided p of the mean."""
        from scipy.special import stdtr

        mean = abs(values.mean())
        error = float(self.error(values))
        if mean == 0 or np.isinf(error):
            return 1.0
        return 2 * float(stdtr(self.freedom, -mean / error if error else -np.inf))


def summary(
    correct: Sequence[Bool[np.ndarray, "_seeds _items"]], *, seed: int = 0
) -> Summary:
    """Return mean, standard deviation over seeds and 95 % interval of the mean over tasks.

    For each task, `correct` marks each seed's right answers to each item. A single seed stands for all; other numbers
    of seeds must be equal.
    """
    mean, std = spread(correct)
    low, high = np.quantile(_resampled(_with_seeds(correct), seed), _TAILS)
    return Summary(mean, std, float(100 * low), float(100 * high))


def spread(
    correct: Sequence[Bool[np.ndarray, "_seeds _items"]],
) -> tuple[float, float | None]:
    """Return mean and standard deviation as `summary` does, without the interval."""
    by_seed = np.mean([table.mean(axis=1) for table in _with_seeds(correct)], axis=0)
    return float(100 * by_seed.mean()), float(100 * by_seed.std(ddof=1)) if len(
        by_seed
    ) > 1 else None


def paired(
    a: Sequence[Bool[np.ndarray, "_seeds _items"]],
    b: Sequence[Bool[np.ndarray, "_seeds _items"]],
    *,
    seed: int = 0,
) -> Paired:
    """Return the difference of two methods on the same tasks, seeds and items, with 95 % interval and p.

    A resample draws the same seeds and items for both. p is twice the share of resamples whose difference has the other
    sign or is zero, with one added to both counts (Davison and Hinkley, 1997, 4.2): never below 0.0002.

    Answers and errors are as in `summary`, with tasks, seeds and items in the same order.
    """
    if len(a) != len(b):
        raise ValueError(
            f"the methods have {len(a)} and {len(b)} tasks: give the same tasks for both"
        )
    both = _with_seeds([*a, *b])
    for number, (first, second) in enumerate(zip(a, b, strict=True)):
        # NumPy would repeat a single item.
        if first.shape[1] != second.shape[1]:
            raise ValueError(
                f"task {number}: the methods have {first.shape[1]} and {second.shape[1]} items: give the same items "
                "for both"
            )
    values = [
        first - second
        for first, second in zip(both[: len(a)], both[len(a) :], strict=True)
    ]
    differences = _resampled(values, seed)
    low, high = np.quantile(differences, _TAILS)
    rounding = 1e-12
    extreme = min(np.sum(differences <= rounding), np.sum(differences >= -rounding))
    p = min(1.0, 2 * (int(extreme) + 1) / (_RESAMPLES + 1))
    mean = np.mean([table.mean() for table in values])
    return Paired(float(100 * mean), float(100 * low), float(100 * high), p)


def over_tasks(values: Sequence[float]) -> Interval | None:
    """Return mean and 95 % t interval of one value for each task, such as a difference; None of fewer than two tasks.

    Tasks count as a random sample: a few that differ much give a wide interval, however many items each of them has.
    """
    if len(values) < 2:
        return None
    return Sample(np.arange(len(values))).interval(np.asarray(values, float))


def holm(p: Sequence[float]) -> list[float]:
    """Return p values of several tests after Holm's correction (1979), in the same order.

    Rejecting those below 5 % makes any false rejection at most 5 % likely, whatever the tests have in common.
    """
    corrected = [0.0] * len(p)
    so_far = 0.0
    for place, test in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        so_far = max(so_far, min(1.0, (len(p) - place) * p[test]))
        corrected[test] = so_far
    return corrected


def _with_seeds(
    tables: Sequence[Bool[np.ndarray, "_seeds _items"]],
) -> list[Int[np.ndarray, "_seeds _items"]]:
    """Return the tables as integers with the same number of seeds each, single ones repeated."""
    if not tables:
        raise ValueError("no task to summarise: give at least one")
    for table in tables:
        if table.ndim != 2 or 0 in table.shape:
            raise ValueError(
                f"a task's answers are {list(table.shape)}: expected [seeds, items], at least one of each"
            )
    counts = sorted({len(table) for table in tables} - {1}) or [1]
    if len(counts) > 1:
        raise ValueError(
            f"the tasks have {' and '.join(map(str, counts))} seeds: give the same seeds for all"
        )
    return [
        np.broadcast_to(table.astype(np.int64), (counts[0], table.shape[1]))
        for table in tables
    ]


def _resampled(
    values: list[Int[np.ndarray, "_seeds _items"]], seed: int
) -> Float[np.ndarray, "resamples"]:
    """Return the mean over the tasks in every resample."""
    seeds = len(values[0])
    resampled = (
        np.random.default_rng(seed).multinomial(
            seeds, np.full(seeds, 1 / seeds), size=_RESAMPLES
        )
        / seeds
    )
    means = np.zeros(_RESAMPLES)
    for task, table in enumerate(values):
        items = table.shape[1]
        by_seed = _item_draws(seed, task, items).astype(np.float32) @ table.T.astype(
            np.float32
        )  # exact: integers
        means += np.sum(resampled * by_seed, axis=1) / (items * len(values))
    return means


@functools.lru_cache(maxsize=64)
def _item_draws(
    seed: int, task: int, items: int
) -> UInt8[np.ndarray, "resamples items"]:
    """Return how often each resample draws each item of a task; every method gets the same."""
    rng = np.random.default_rng([seed, task])
    chunks = []
    for _ in range(_RESAMPLES // _CHUNK):
        draws = (
            rng.integers(items, size=(_CHUNK, items))
            + items * np.arange(_CHUNK)[:, None]
        )
        counts = np.bincount(draws.ravel(), minlength=items * _CHUNK)
        chunks.append(counts.reshape(_CHUNK, items).astype(np.uint8))
    return np.concatenate(chunks)
