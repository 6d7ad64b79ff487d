"""Plots of runs as PNG: the methods' means, learning curves, coefficients.

They raise ValueError for names that do not fit, without data, or if matplotlib is not installed.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from .figure import colour, literal, plot
from .scores import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def plot_means(scores: Scores, path: Path, *, title: str = "") -> None:
    """Draw each method's mean exact match as a dot with its 95 % interval, in the order given, the first on top."""
    found = {method: summary for method, summary in scores.summaries.items() if summary}
    if not found:
        raise ValueError(f"no method has results of all {len(scores.tasks)} tasks: there are no means to draw")

    def draw(figure: "Figure") -> None:
        axes, shade = figure.subplots(), colour(3)
        for position, summary in enumerate(found.values()):
            axes.hlines(position, summary.low, summary.high, color=shade, linewidth=2)
            axes.plot(summary.mean, position, "o", color=shade, markersize=6)
            margin = axes.get_yaxis_transform()
            axes.text(1.01, position, f"{summary.mean:.1f}", transform=margin, va="center", color="#333333", size=10)
        axes.set_yticks(range(len(found)), [*map(literal, found)])
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlim(0, 1.04 * max(summary.high for summary in found.values()) or 1)
        axes.grid(visible=True, axis="both")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("exact match, %, with 95 % interval")
        figure.suptitle(title, x=0.01, ha="left", size=12)

    plot(path, (6.0, 0.3 * len(found) + 1.2), draw)


def plot_learning_curves(metrics: Mapping[str, Mapping[str, Sequence[Row]]], path: Path, *, title: str = "") -> None:
    """Draw the cross-entropy against the step, a panel a task: every seed as a thin line, their mean as a thick one.

    The axis of the loss is logarithmic. `metrics` has the lines of metrics.jsonl by task and method. A method without
    any has no curve, but takes a colour.
    """
    methods = list(dict.fromkeys(method for by_method in metrics.values() for method in by_method))
    curves = {task: {m: _curves(lines) for m, lines in by_method.items()} for task, by_method in metrics.items()}
    drawn = [m for m in methods if any(by_method.get(m) for by_method in curves.values())]
    if not drawn:
        raise ValueError("no learning curves: give lines with step, seed and cross_entropy")
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
                _draw_curves(panel, by_seed, colour(methods.index(method)))
            panel.set_yscale("log")
            panel.set_title(literal(task), loc="left")
        figure.supylabel("cross-entropy, nats per token", size=11)
        figure.suptitle(title, x=0.01, ha="left", size=12)
        lines = [panels[0, 0].plot([], [], color=colour(methods.index(m)), linewidth=2)[0] for m in drawn]
        figure.legend(lines, [*map(literal, drawn)], loc="outside lower center", ncols=len(drawn))

    plot(path, (3.4 * columns + 0.5, 2.6 * rows + 0.9), draw)


def plot_coefficients(
    coefficients: Float[np.ndarray, "N columns"],
    modules: Sequence[str],
    columns: Sequence[str],
    path: Path,
    *,
    title: str = "",
) -> None:
    """Draw coefficients as a heat map of modules by columns, the largest rows on top, zero in white."""
    if coefficients.shape != (len(modules), len(columns)):
        names = [len(modules), len(columns)]
        raise ValueError(f"expected names for every row and column of {list(coefficients.shape)}, got {names}")
    order = np.argsort(-np.abs(coefficients).sum(axis=1))
    shown, names = coefficients[order], [modules[int(i)] for i in order]
    limit = float(np.abs(shown).max()) or 1.0

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        image = axes.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.grid(visible=False)
        axes.set_yticks(range(len(names)), [*map(literal, names)])
        axes.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) <= 8 else 90)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if len(columns) <= 12:
            for (i, j), value in np.ndenumerate(shown):
                ink = "white" if abs(value) > 0.6 * limit else "#222222"
                axes.text(j, i, f"{round(float(value), 2) + 0.0:.2f}", ha="center", va="center", color=ink, size=9)
        axes.set_title(title, loc="left")
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("coefficient")
        bar.outline.set_visible(False)

    plot(path, (max(4.0, 0.75 * min(len(columns), 12)) + 3, 0.3 * len(names) + 1.2), draw)


def _curves(lines: Sequence[Row]) -> dict[int, tuple[list[int], list[float]]]:
    """Return (steps, values) by seed."""
    curves: dict[int, tuple[list[int], list[float]]] = {}
    for line in lines:
        if "cross_entropy" in line:
            steps, values = curves.setdefault(line["seed"], ([], []))
            steps.append(line["step"])
            values.append(math.nan if (loss := line["cross_entropy"]) is None else loss)  # None: it was not finite
    return curves


def _draw_curves(panel: "Axes", by_seed: Mapping[int, tuple[list[int], list[float]]], shade: str) -> None:
    for steps, values in by_seed.values():
        panel.plot(steps, values, color=shade, linewidth=0.6, alpha=0.35)
    shortest = min((len(steps) for steps, _ in by_seed.values()), default=0)
    if shortest:
        steps = next(iter(by_seed.values()))[0][:shortest]
        mean = np.mean([values[:shortest] for _, values in by_seed.values()], axis=0)
        panel.plot(steps, mean, color=shade, linewidth=2)
