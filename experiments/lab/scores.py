"""Rows with the same shots: as arrays, with seeds and test items in the same places for every method, and as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from lorafusion_jax.report import (
    Column,
    Interval,
    Paired,
    Summary,
    Table,
    over_tasks,
    paired,
    spread_over_seeds,
    summary,
)
from lorafusion_jax.trials import key, name

# The result of one method on one task with one seed; `correct` has a 0 or 1 for every test row, in order.
Row = Mapping[str, Any]
Marks = Literal["correct", "option_correct"]
Values = Literal["exact_match", "loss"]
Answers = list[Bool[np.ndarray, "_seeds _items"]]  # one array for each task
Spread = tuple[float, float | None]  # mean, standard deviation over seeds
_MOST_TASKS = 8  # that fit next to the means
_EXAMPLES = {"95+5": "95 + 5 examples", "5": "5 examples"}
_MEANS = (
    Column("mean", "spread"),
    Column("95 % interval", "interval"),
    Column("loss", "nats"),
    Column("option accuracy, %", "percent"),
    Column("trainable parameters", "counts"),
    Column("forward rows", "count"),
    Column("seconds", "seconds"),
)


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
        return None if answers is None else spread_over_seeds(answers)

    def option_accuracy(self, method: str) -> Spread | None:
        """Return mean and deviation of accuracy with option scoring over the tasks; None where a task has none."""
        answers = self._all_answers(method, self.tasks, "option_correct")
        return None if answers is None else spread_over_seeds(answers)

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


def main_tables(scores: Scores) -> list[Table]:
    """Return methods by tasks: exact match (mean ± sample standard deviation over seeds), the tasks' mean, the cost.

    The mean has a 95 % bootstrap interval over seeds and test items. The loss is that of the test rows' answers, nats
    per token. Forward rows and seconds are those of adapting to one task with one seed. More than 8 tasks go to a
    second table, of tasks by methods.
    """
    shown = scores.tasks if len(scores.tasks) <= _MOST_TASKS else []
    columns = [
        Column("method", "text"),
        *(Column(task, "spread") for task in shown),
        *_MEANS,
    ]
    lines = [
        [m, *(scores.exact_match(m, task) for task in shown), *_means(scores, m)]
        for m in scores.methods
    ]
    seeds = max(
        len({row["seed"] for row in scores.of(method)}) for method in scores.methods
    )
    over = f"{seeds} seed{'s' if seeds > 1 else ''}"
    caption = f"Exact match, %, {shots_name(scores.shots)}: mean ± standard deviation over {over}"
    tables = [Table(caption, columns, lines)]
    if not shown:
        columns = [
            Column("task", "text"),
            *(Column(method, "spread") for method in scores.methods),
        ]
        lines = [
            [task, *(scores.exact_match(method, task) for method in scores.methods)]
            for task in scores.tasks
        ]
        tables.append(Table(f"{caption}, by task", columns, lines))
    return tables


def paired_table(scores: Scores, reference: str) -> Table:
    """Return the reference minus every other method, in points of exact match and nats of loss.

    The mean of the tasks has a 95 % bootstrap interval over seeds and items of these very tasks and a two-sided p, and
    a t interval over the tasks. The loss has a t interval over the tasks alone.
    """
    if reference not in scores.methods:
        raise ValueError(
            f"no results of {reference!r} to compare with: choose one of {', '.join(scores.methods)}"
        )
    lines = []
    for method in scores.methods:
        if method != reference:
            pair = scores.paired(reference, method)
            points = scores.over_tasks(reference, method, "exact_match")
            nats = scores.over_tasks(reference, method, "loss")
            difference, interval, p = (
                (None,) * 3 if pair is None else (pair[0], pair[1:3], pair.p)
            )
            loss, loss_interval = (
                (None, None) if nats is None else (nats.mean, nats[1:])
            )
            lines.append(
                [
                    method,
                    difference,
                    interval,
                    None if points is None else points[1:],
                    p,
                    loss,
                    loss_interval,
                ]
            )
    columns = [
        Column("method", "text"),
        Column("difference", "points"),
        Column("95 % interval", "interval"),
        Column("over tasks", "interval"),
        Column("p", "p"),
        Column("loss", "more nats"),
        Column("loss over tasks", "nats interval"),
    ]
    caption = f"{reference} minus each other method, points of exact match, {shots_name(scores.shots)}"
    caption += ": same tasks, seeds and test items; p for each comparison by itself; t intervals over tasks"
    return Table(caption, columns, lines)


def shots_name(shots: str) -> str:
    """Return the number of examples (shots), in words."""
    return _EXAMPLES.get(shots, shots)


def _means(scores: Scores, method: str) -> list[Any]:
    summary = scores.summaries[method]
    options = scores.option_accuracy(method)
    rows = scores.of(method)
    counts = [row["trainable"] for row in rows]
    return [
        None if summary is None else (summary.mean, summary.std),
        None if summary is None else (summary.low, summary.high),
        scores.loss(method),
        None if options is None else options[0],
        (min(counts), max(counts)),
        fmean(row["forward_rows"] for row in rows),
        fmean(row["seconds"] for row in rows),
    ]
