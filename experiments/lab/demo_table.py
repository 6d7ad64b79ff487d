"""The demos' table: tasks by methods, with the spread over seeds."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lorafusion_jax.report.formats import EMPTY, counts, spread
from lorafusion_jax.text_tables import escaped, markdown

_MEAN = "mean"


def markdown_table(rows: Sequence[Mapping[str, Any]], *, apart: Collection[str] = ()) -> str:
    """Return a table of tasks by methods: exact match, mean ± sample standard deviation over the seeds.

    A row is one task, method and seed: `task`, `method`, `seed`, `exact_match` in percent, `trainable` numbers, and
    `seconds` of training. Tasks and methods keep the order in which they first occur.

    Below the tasks: their mean (the spread is that of the seeds' means), trainable numbers, and seconds of training for
    one task and seed. Tasks in `apart` are shown behind the mean and not counted in it.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        scores.setdefault(row["task"], {}).setdefault(row["method"], {})[row["seed"]] = row["exact_match"]
    counted = {task: by_method for task, by_method in scores.items() if task not in apart}
    means: dict[str, dict[int, float]] = {}
    for method in methods:
        seeds = [by_method.get(method, {}) for by_method in counted.values()]
        everywhere = [seed for seed in seeds[0] if all(seed in there for there in seeds)] if seeds else []
        means[method] = {seed: statistics.fmean(there[seed] for there in seeds) for seed in everywhere}
    lines = [("exact match, %", *map(escaped, methods))]
    for task, by_method in (counted | {_MEAN: means} | scores).items():
        found = [[*by_method.get(method, {}).values()] for method in methods]
        cells = [spread((statistics.fmean(values), _deviation(values))) if values else EMPTY for values in found]
        lines.append((f"**{task}**" if task == _MEAN else escaped(task), *cells))
    of = [[row for row in rows if row["method"] == method] for method in methods]
    trainable = [sorted(row["trainable"] for row in of_method) for of_method in of]
    lines.append(("trainable numbers", *(counts((found[0], found[-1])) for found in trainable)))
    seconds = [statistics.fmean(row["seconds"] for row in of_method) for of_method in of]
    lines.append(("seconds of training", *(f"{mean:.1f}" for mean in seconds)))
    return markdown(lines)


def _deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None
