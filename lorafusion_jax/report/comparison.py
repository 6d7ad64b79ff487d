"""Plots of one league as PNG: the methods' means with intervals, and the means against trainable numbers.

They raise ValueError if no method has every task, or matplotlib is not installed.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .figure import colour, literal, plot
from .labels import label_points
from .scores import Scores
from .statistics import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINT = colour(3)
_FRAME = "#999999"
_WIDTH = 6.0  # inches: still to be read where a phone shows it


def plot_means(scores: Scores, path: Path, *, title: str = "") -> None:
    """Draw each method's mean exact match as a dot with its 95 % interval, in the order given, the first on top."""
    found = _complete(scores)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for position, summary in enumerate(found.values()):
            axes.hlines(position, summary.low, summary.high, color=_POINT, linewidth=2)
            axes.plot(summary.mean, position, "o", color=_POINT, markersize=6)
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

    plot(path, (_WIDTH, 0.3 * len(found) + 1.2), draw)


def plot_against_trainable(scores: Scores, path: Path, *, title: str = "") -> None:
    """Draw mean exact match, with its 95 % interval, against trainable numbers: every method a point with its name.

    The axis is logarithmic; methods that train nothing stand to its left.
    """
    found = _complete(scores)
    counts = [max(row["trainable"] for row in scores.of(method)) for method in found]
    trained = [count for count in counts if count]
    least, most = (min(trained), max(trained)) if trained else (1, 1)
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most) + 0.2)
    none = low - 1.6
    places = [math.log10(count) if count else none for count in counts]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for x, summary in zip(places, found.values(), strict=True):
            axes.vlines(x, summary.low, summary.high, color=_POINT, linewidth=1, alpha=0.45)
            axes.plot(x, summary.mean, "o", color=_POINT, markersize=6, zorder=3)
        _trainable_axis(axes, low, high, none if 0 in counts else None)
        axes.set_ylim(0, 1.08 * max(summary.high for summary in found.values()) or 1)
        axes.set_ylabel("exact match, %, with 95 % interval")
        figure.suptitle(title, x=0.01, ha="left", size=12)
        figure.draw_without_rendering()  # the layout has to stand before texts can be placed
        points = [(x, summary.mean) for x, summary in zip(places, found.values(), strict=True)]
        label_points(axes, points, [(summary.low, summary.high) for summary in found.values()], list(found))

    plot(path, (_WIDTH, 5.4), draw)


def _complete(scores: Scores) -> dict[str, Summary]:
    found = {method: summary for method, summary in scores.summaries.items() if summary}
    if not found:
        raise ValueError(f"no method has results of all {len(scores.tasks)} tasks: there are no means to draw")
    return found


def _trainable_axis(axes: "Axes", low: int, high: int, none: float | None) -> None:
    """Label powers of ten, and, where some method trains nothing, its place before a gap in the axis."""
    ticks: list[float] = [*range(low, high + 1)]
    labels = [f"{10**tick:,}" if tick < 6 else f"{10 ** (tick - 6):,} million" for tick in range(low, high + 1)]
    if none is not None:
        ticks, labels = [none, *ticks], ["none", *labels]
        axes.axvline(low - 0.15, color=_FRAME, linewidth=1, linestyle=(0, (2, 3)), zorder=0)
    axes.set_xticks(ticks, labels)
    minor: Sequence[float] = [tick + math.log10(k) for tick in range(low, high) for k in range(2, 10)]
    axes.set_xticks(minor, minor=True)
    axes.set_xlim((low - 0.3 if none is None else none - 0.4), high + 0.1)
    axes.set_xlabel("trainable numbers")
