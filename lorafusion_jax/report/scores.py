"""The rows with the same shots as arrays: the same seeds and test items in the same places for every method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from .statistics import Interval, Paired, Summary, over_tasks, paired, spread, summary

# The result of one method on one task with one seed; `correct` has a 0 or 1 for every test row, in order.
Row = Mapping[str, Any]
Marks = Literal["correct", "option_correct"]
Values = Literal["exact_match", "loss"]
Answers = list[Bool[np.ndarray, "_seeds _items"]]  # one array for each task
Spread = tuple[float, float | None]  # mean, standard deviation over seeds


@dataclass(frozen=True)
class Scores:
    """Results with the same shots, with tasks and methods in the order of their first occurrence."""

    shots: str
    rows: Sequence[Row]

    @cached_property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row["task"] for row in self.rows))

    @cached_property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row["method"] for row in self.rows))

    @cached_property
    def summaries(self) -> dict[str, Summary | None]:
        """Exact match of each method, mean of the tasks; None where it lacks a task."""
        answers = {
            method: self._all_answers(method, self.tasks, "correct")
            for method in self.methods
        }
        return {
            method: None if correct is None else summary(correct)
            for method, correct in answers.items()
        }

    def exact_match(self, method: str, task: str) -> Spread | None:
        """Return mean and standard deviation of a method on one task, None where it was not run."""
        answers = self._all_answers(method, [task], "correct")
        return None if answers is None else spread(answers)

    def option_accuracy(self, method: str) -> Spread | None:
        """Return mean and deviation of accuracy with option scoring over the tasks; None where a task has none."""
        answers = self._all_answers(method, self.tasks, "option_correct")
        return None if answers is None else spread(answers)

    def paired(self, method: str, second: str) -> Paired | None:
        """Return a method minus another, on the seeds that both have; None where they share no task or seed.

        A method with a single seed, as zero-shot has, stands for all seeds of the other.
        """
        seeds, second_seeds = self._seeds_of_both(method, second)
        if not seeds or not second_seeds:
            return None
        return paired(
            self._answers(method, self.tasks, seeds),
            self._answers(second, self.tasks, second_seeds),
        )

    def loss(self, method: str) -> float | None:
        """Return the loss on test rows, mean over tasks and seeds; None where a task or a loss is missing."""
        values = self._values(method, self._seeds(method, self.tasks), "loss")
        return None if values is None else fmean(values)

    def over_tasks(
        self, method: str, second: str, column: Values = "exact_match"
    ) -> Interval | None:
        """Return a method minus another, with a t interval over the tasks; seeds are those of `paired`."""
        seeds, second_seeds = self._seeds_of_both(method, second)
        a = self._values(method, seeds, column)
        b = self._values(second, second_seeds, column)
        if a is None or b is None:
            return None
        return over_tasks([x - y for x, y in zip(a, b, strict=True)])

    def of(self, method: str) -> list[Row]:
        """Return all rows of a method."""
        return [row for row in self.rows if row["method"] == method]

    @cached_property
    def _cells(self) -> dict[tuple[str, str], dict[int, Row]]:
        cells: dict[tuple[str, str], dict[int, Row]] = {}
        for row in self.rows:
            cells.setdefault((row["method"], row["task"]), {})[row["seed"]] = row
        return cells

    def _seeds(self, method: str, tasks: Sequence[str]) -> list[int]:
        """Return the seeds that a method was run with on every task."""
        return sorted(
            set.intersection(
                *(set(self._cells.get((method, task), {})) for task in tasks)
            )
        )

    def _seeds_of_both(self, method: str, second: str) -> tuple[list[int], list[int]]:
        seeds = self._seeds(method, self.tasks)
        second_seeds = self._seeds(second, self.tasks)
        if len(seeds) > 1 and len(second_seeds) > 1:
            seeds = second_seeds = [seed for seed in seeds if seed in second_seeds]
        return seeds, second_seeds

    def _values(
        self, method: str, seeds: Sequence[int], column: Values
    ) -> list[float] | None:
        """Return the mean over seeds for each task, None where a value is missing."""
        task_values = [
            [self._cells[method, task][seed][column] for seed in seeds]
            for task in self.tasks
        ]
        if not seeds or any(
            value is None for values in task_values for value in values
        ):
            return None
        return [
            fmean(value for value in values if value is not None)
            for values in task_values
        ]

    def _answers(
        self,
        method: str,
        tasks: Sequence[str],
        seeds: Sequence[int],
        marks: Marks = "correct",
    ) -> Answers:
        by_task = [
            [self._cells[method, task][seed][marks] or "" for seed in seeds]
            for task in tasks
        ]
        return [
            np.array([[mark == "1" for mark in answers] for answers in by_seed])
            for by_seed in by_task
        ]

    def _all_answers(
        self, method: str, tasks: Sequence[str], marks: Marks
    ) -> Answers | None:
        seeds = self._seeds(method, tasks)
        if not seeds or any(
            self._cells[method, task][seed][marks] is None
            for task in tasks
            for seed in seeds
        ):
            return None
        return self._answers(method, tasks, seeds, marks)


def scores(rows: Sequence[Row]) -> list[Scores]:
    """Return the results of each number of shots, in the order in which they first occur."""
    if not rows:
        raise ValueError("no results to report: give at least one row")
    items: dict[str, Row] = {}
    seen = set()
    for row in rows:
        first = items.setdefault(row["task"], row)
        if len(first["correct"]) != len(row["correct"]):
            counts = f"{len(first['correct'])} ({first['method']}) and {len(row['correct'])} ({row['method']})"
            raise ValueError(
                f"{row['task']} has {counts} test rows: give the same for all methods and seeds"
            )
        if key(row) in seen:
            raise ValueError(
                f"{name(row)} occurs twice: read the files with merge, which keeps one of equals"
            )
        seen.add(key(row))
    counts = dict.fromkeys(row["shots"] for row in rows)
    return [
        Scores(shots, [row for row in rows if row["shots"] == shots])
        for shots in counts
    ]


def key(row: Row) -> tuple[str, str, str, int]:
    """Return task, method, shots and seed of a row, which identify it."""
    return row["task"], row["method"], row["shots"], row["seed"]


def name(row: Row) -> str:
    """Return the same in words."""
    return f"{row['task']}, {row['method']}, {row['shots']} shots, seed {row['seed']}"
