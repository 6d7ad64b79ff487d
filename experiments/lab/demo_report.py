"""The demos' report: tasks by methods, with the spread over seeds, as a table and as bars."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafusion_jax.report import (
    EMPTY,
    as_markdown as markdown,
    colour,
    counts,
    escaped,
    literal,
    plot,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_MEAN = "mean"


def markdown_table(rows: Sequence[Row], *, apart: Collection[str] = ()) -> str:
    """Return a table of tasks by methods: exact match, mean ± sample standard deviation over the seeds.

    A row is one task, method and seed: `task`, `method`, `seed`, `exact_match` in percent, `trainable` numbers, and
    `seconds` of training. Tasks and methods keep the order in which they first occur.

    Below the tasks: their mean (the spread is that of the seeds' means), trainable parameters, and seconds of training
    for one task and seed. Tasks in `apart` are shown behind the mean and not counted in it.
    """
    methods, scores = _seed_scores(rows, apart)
    lines = [("exact match, %", *map(escaped, methods))]
    for task, by_method in scores.items():
        found = [[*by_method.get(method, {}).values()] for method in methods]
        cells = [
            spread((statistics.fmean(values), _deviation(values))) if values else EMPTY
            for values in found
        ]
        lines.append((f"**{task}**" if task == _MEAN else escaped(task), *cells))
    of = [[row for row in rows if row["method"] == method] for method in methods]
    trainable = [sorted(row["trainable"] for row in of_method) for of_method in of]
    lines.append(
        (
            "trainable parameters",
            *(counts((found[0], found[-1])) for found in trainable),
        )
    )
    seconds = [
        statistics.fmean(row["seconds"] for row in of_method) for of_method in of
    ]
    lines.append(("seconds of training", *(f"{mean:.1f}" for mean in seconds)))
    return markdown(lines)


def plot_accuracy(
    rows: Sequence[Row], path: Path, *, apart: Collection[str] = (), title: str = ""
) -> None:
    """Draw exact match per task and method as bars, with the seeds as dots and their spread."""
    methods, scores = _seed_scores(rows, apart)
    width = 0.84 / len(methods)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for i, method in enumerate(methods):
            label: str | None = literal(
                method
            )  # of its first bar: it may lack the first task
            for position, by_method in enumerate(scores.values()):
                values = list(by_method.get(method, {}).values())
                if not values:
                    continue
                x = position + (i - (len(methods) - 1) / 2) * width
                mean = statistics.fmean(values)
                spread = _deviation(values)
                axes.bar(x, mean, 0.92 * width, color=colour(i), label=label)
                label = None
                if spread is not None:
                    axes.errorbar(
                        x, mean, spread, color="#333333", linewidth=1.2, capsize=2.5
                    )
                    offsets = np.linspace(-0.22, 0.22, len(values)) * width
                    dots = {"color": "white", "edgecolor": "#333333", "linewidth": 0.7}
                    axes.scatter(
                        x + offsets, values, s=11, zorder=3, clip_on=False, **dots
                    )
        position = list(scores).index(_MEAN)
        axes.axvspan(position - 0.5, position + 0.5, color="#f3f3f3", zorder=-1)
        axes.set_xticks(
            range(len(scores)), [literal(task).replace("_", "\n") for task in scores]
        )
        axes.set_xlim(-0.5, len(scores) - 0.5)
        axes.set_ylim(0, 100)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("exact match, %")
        axes.set_title(title, loc="left")
        figure.legend(loc="outside lower center", ncols=len(methods))

    plot(path, (1.6 * len(scores) + 1.5, 4.8), draw)


def _seed_scores(
    rows: Sequence[Row], apart: Collection[str]
) -> tuple[list[str], dict[str, dict[str, dict[int, float]]]]:
    """Return the methods, and exact match by task, method and seed, with the mean of the tasks among the tasks."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        scores.setdefault(row["task"], {}).setdefault(row["method"], {})[
            row["seed"]
        ] = row["exact_match"]
    counted = {
        task: by_method for task, by_method in scores.items() if task not in apart
    }
    means: dict[str, dict[int, float]] = {}
    for method in methods:
        seeds = [by_method.get(method, {}) for by_method in counted.values()]
        everywhere = (
            [seed for seed in seeds[0] if all(seed in there for there in seeds)]
            if seeds
            else []
        )
        means[method] = {
            seed: statistics.fmean(there[seed] for there in seeds)
            for seed in everywhere
        }
    return methods, counted | {_MEAN: means} | scores


def _deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None
