"""Tables and plots of results: rows in, Markdown and PNG out, written beside their target and then renamed.

A row is one task, method and seed: `task`, `method`, `seed`, `exact_match` in percent, `trainable` numbers, and
`seconds` of training. Tasks and methods keep the order in which they first occur.
"""

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_KEYS = ("task", "method", "seed", "exact_match", "trainable", "seconds")
_MEAN = "mean"
# Okabe and Ito's palette, told apart by colour-blind eyes, without its yellow, too light for lines on white.
_COLOURS = ("#999999", "#E69F00", "#56B4E9", "#0072B2", "#CC79A7", "#D55E00", "#009E73", "#000000")
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "legend.frameon": False,
}


def markdown_table(rows: Sequence[Row], *, apart: Collection[str] = ()) -> str:
    """Return a table of tasks by methods: exact match, mean ± sample standard deviation over the seeds.

    Below the tasks: their mean (the spread is that of the seeds' means), trainable numbers, and seconds of
    training for one task and seed.

    Args:
      rows: the results.
      apart: tasks that are shown behind the mean and not counted in it.

    Raises:
      ValueError: there are no rows, or a row lacks a key.
    """
    methods, scores = _scores(rows, apart)
    lines = [("exact match, %", *methods)]
    lines += [
        (f"**{task}**" if task == _MEAN else task, *(_spread(by_method.get(method, {})) for method in methods))
        for task, by_method in scores.items()
    ]
    lines.append(("trainable numbers", *(_trainable(rows, method) for method in methods)))
    seconds = [[row["seconds"] for row in rows if row["method"] == method] for method in methods]
    lines.append(("seconds of training", *(f"{statistics.fmean(values):.1f}" for values in seconds)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (aligned[0], rule, *aligned[1:]))


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    _write(path, lambda partial: partial.write_text(text))


def plot_accuracy(rows: Sequence[Row], path: Path, *, apart: Collection[str] = (), title: str = "") -> None:
    """Draw exact match per task and method as bars, with the seeds as dots and their spread.

    Raises:
      ValueError: as `markdown_table` does; matplotlib is not installed.
    """
    methods, scores = _scores(rows, apart)
    width = 0.84 / len(methods)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for i, method in enumerate(methods):
            for position, by_method in enumerate(scores.values()):
                values = list(by_method.get(method, {}).values())
                if not values:
                    continue
                x = position + (i - (len(methods) - 1) / 2) * width
                mean, spread = statistics.fmean(values), _deviation(values)
                axes.bar(x, mean, 0.92 * width, color=_colour(i), label=method if position == 0 else None)
                if spread is not None:
                    axes.errorbar(x, mean, spread, color="#333333", linewidth=1.2, capsize=2.5)
                    offsets = np.linspace(-0.22, 0.22, len(values)) * width
                    dots = {"color": "white", "edgecolor": "#333333", "linewidth": 0.7}
                    axes.scatter(x + offsets, values, s=11, zorder=3, clip_on=False, **dots)
        position = list(scores).index(_MEAN)
        axes.axvspan(position - 0.5, position + 0.5, color="#f3f3f3", zorder=-1)
        axes.set_xticks(range(len(scores)), [_wrapped(task) for task in scores])
        axes.set_xlim(-0.5, len(scores) - 0.5)
        axes.set_ylim(0, 100)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("exact match, %")
        axes.set_title(title, loc="left")
        figure.legend(loc="outside lower center", ncols=len(methods))

    _plot(path, (1.6 * len(scores) + 1.5, 4.8), draw)


def plot_learning_curves(
    metrics: Mapping[str, Mapping[str, Sequence[Row]]], path: Path, *, key: str = "cross_entropy", title: str = ""
) -> None:
    """Draw the loss against the step, a panel a task: every seed as a thin line, their mean as a thick one.

    The axis of the loss is logarithmic.

    Args:
      metrics: task -> method -> lines of metrics.jsonl, of which those with `key` count. A method without any
        has no curve, but keeps its colour from the methods behind it, as in the plot of accuracy.
      path: of the PNG.
      key: what is drawn.
      title: above all panels.

    Raises:
      ValueError: there is nothing to draw; matplotlib is not installed.
    """
    methods = list(dict.fromkeys(method for by_method in metrics.values() for method in by_method))
    curves = {task: {m: _curves(lines, key) for m, lines in by_method.items()} for task, by_method in metrics.items()}
    drawn = [m for m in methods if any(by_method.get(m) for by_method in curves.values())]
    if not drawn:
        raise ValueError(f"no learning curves: wanted lines with step, seed and {key}")
    columns = min(len(curves), 3 if len(curves) <= 6 else 4)
    rows = math.ceil(len(curves) / columns)

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for i, panel in enumerate(panels.flat):
            if i >= len(curves):
                panel.remove()
            elif i + columns >= len(curves):
                panel.set_xlabel("step")
                panel.tick_params(labelbottom=True)
        for panel, (task, by_method) in zip(panels.flat, curves.items(), strict=False):
            for method, by_seed in by_method.items():
                _draw_curves(panel, by_seed, _colour(methods.index(method)))
            panel.set_yscale("log")
            panel.set_title(task, loc="left")
        figure.supylabel(f"{key.replace('_', '-')}, nats per token", size=11)
        figure.suptitle(title, x=0.01, ha="left", size=12)
        lines = [panels[0, 0].plot([], [], color=_colour(methods.index(m)), linewidth=2)[0] for m in drawn]
        figure.legend(lines, drawn, loc="outside lower center", ncols=len(drawn))

    _plot(path, (3.4 * columns + 0.5, 2.6 * rows + 0.9), draw)


def plot_coefficients(
    coefficients: Float[np.ndarray, "N columns"],
    modules: Sequence[str],
    columns: Sequence[str],
    path: Path,
    *,
    title: str = "",
) -> None:
    """Draw coefficients as a heat map of modules by columns, the largest rows on top, zero in white.

    Raises:
      ValueError: the names do not fit the coefficients; matplotlib is not installed.
    """
    if coefficients.shape != (len(modules), len(columns)):
        raise ValueError(
            f"coefficients are {list(coefficients.shape)}, names are for {[len(modules), len(columns)]}: wanted a "
            "name for every row and column"
        )
    order = np.argsort(-np.abs(coefficients).sum(axis=1))
    shown, names = coefficients[order], [modules[int(i)] for i in order]
    limit = float(np.abs(shown).max()) or 1.0

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        image = axes.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.grid(visible=False)
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) <= 8 else 90)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if len(columns) <= 12:
            for (i, j), value in np.ndenumerate(shown):
                colour = "white" if abs(value) > 0.6 * limit else "#222222"
                axes.text(j, i, f"{round(float(value), 2) + 0.0:.2f}", ha="center", va="center", color=colour, size=9)
        axes.set_title(title, loc="left")
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("coefficient")
        bar.outline.set_visible(False)

    _plot(path, (max(4.0, 0.75 * min(len(columns), 12)) + 3, 0.3 * len(names) + 1.2), draw)


def _scores(rows: Sequence[Row], apart: Collection[str]) -> tuple[list[str], dict[str, dict[str, dict[int, float]]]]:
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
    return methods, counted | {_MEAN: means} | shown_last


def _spread(values: Mapping[int, float]) -> str:
    if not values:
        return "–"
    deviation = _deviation(list(values.values()))
    mean = f"{statistics.fmean(values.values()):.1f}"
    return mean if deviation is None else f"{mean} ± {deviation:.1f}"


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _trainable(rows: Sequence[Row], method: str) -> str:
    counts = sorted({row["trainable"] for row in rows if row["method"] == method})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _curves(lines: Sequence[Row], key: str) -> dict[int, tuple[list[int], list[float]]]:
    """Return (steps, values) by seed."""
    curves: dict[int, tuple[list[int], list[float]]] = {}
    for line in lines:
        if key in line:
            steps, values = curves.setdefault(line["seed"], ([], []))
            steps.append(line["step"])
            values.append(line[key])
    return curves


def _draw_curves(panel: "Axes", by_seed: Mapping[int, tuple[list[int], list[float]]], colour: str) -> None:
    for steps, values in by_seed.values():
        panel.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
    shortest = min((len(steps) for steps, _ in by_seed.values()), default=0)
    if shortest:
        steps = next(iter(by_seed.values()))[0][:shortest]
        mean = np.mean([values[:shortest] for _, values in by_seed.values()], axis=0)
        panel.plot(steps, mean, color=colour, linewidth=2)


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _wrapped(task: str) -> str:
    return task.replace("_", "\n")


def _plot(path: Path, size: tuple[float, float], draw: Callable[["Figure"], None]) -> None:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"plots need {error.name}, which is not installed: pip install -e '.[plots]'") from error
    # Not pyplot: a figure of its own draws with Agg and leaves no state behind.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(size, dpi=150, layout="constrained")
        draw(figure)
        _write(path, lambda partial: figure.savefig(partial, format="png"))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)
