"""Tasks by methods, with the spread over seeds: scores and their Markdown table.

A row is one task, method and seed: `task`, `method`, `seed`, `exact_match` in percent, `trainable` numbers, and
`seconds` of training. Tasks and methods keep the order in which they first occur.
"""

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..text_tables import escaped, markdown

_KEYS = ("task", "method", "seed", "exact_match", "trainable", "seconds")
MEAN = "mean"


def markdown_table(rows: Sequence[Mapping[str, Any]], *, apart: Collection[str] = ()) -> str:
    """Return a table of tasks by methods: exact match, mean ± sample standard deviation over the seeds.

    Below the tasks: their mean (the spread is that of the seeds' means), trainable numbers, and seconds of training for
    one task and seed. Tasks in `apart` are shown behind the mean and not counted in it.

    Raises:
      ValueError: there are no rows, or a row lacks a key.
    """
    methods, scores = seed_scores(rows, apart)
    lines = [("exact match, %", *map(escaped, methods))]
    lines += [
        (f"**{task}**" if task == MEAN else escaped(task), *(_spread(by_method.get(method, {})) for method in methods))
        for task, by_method in scores.items()
    ]
    lines.append(("trainable numbers", *(_trainable(rows, method) for method in methods)))
    seconds = [[row["seconds"] for row in rows if row["method"] == method] for method in methods]
    lines.append(("seconds of training", *(f"{statistics.fmean(values):.1f}" for values in seconds)))
    return markdown(lines)


def seed_scores(
    rows: Sequence[Mapping[str, Any]], apart: Collection[str]
) -> tuple[list[str], dict[str, dict[str, dict[int, float]]]]:
    """Return the methods, and exact match by task, method and seed, with the mean of the tasks among the tasks."""
    if not rows:
        raise ValueError("no results to report: give at least one row")
    for row in rows:
        if missing := [key for key in _KEYS if key not in row]:
            raise ValueError(f"a row lacks {', '.join(missing)}: {dict(row)}")
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        scores.setdefault(row["task"], {}).setdefault(row["method"], {})[row["seed"]] = row["exact_match"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    counted = {task: by_method for task, by_method in scores.items() if task not in apart}
    means: dict[str, dict[int, float]] = {}
    for method in methods:
        seeds = [by_method.get(method, {}) for by_method in counted.values()]
        everywhere = [seed for seed in seeds[0] if all(seed in there for there in seeds)] if seeds else []
        means[method] = {seed: statistics.fmean(there[seed] for there in seeds) for seed in everywhere}
    shown_last = {task: by_method for task, by_method in scores.items() if task in apart}
    return methods, counted | {MEAN: means} | shown_last


def _spread(values: Mapping[int, float]) -> str:
    if not values:
        return "–"
    spread = deviation(list(values.values()))
    mean = f"{statistics.fmean(values.values()):.1f}"
    return mean if spread is None else f"{mean} ± {spread:.1f}"


def deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _trainable(rows: Sequence[Mapping[str, Any]], method: str) -> str:
    counts = sorted({row["trainable"] for row in rows if row["method"] == method})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
