"""Plots of one league as PNG: the methods' means with intervals, and the means against trainable numbers.

They raise ValueError if no method has every task, or matplotlib is not installed.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .figure import colour, literal, plot
from .scores import Scores
from .statistics import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINT = colour(3)
_NEAR = 5.0  # radius in points around a point that texts keep off
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
        _label_points(axes, points, [(summary.low, summary.high) for summary in found.values()], list(found))

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


def _label_points(
    axes: "Axes", points: Sequence[tuple[float, float]], spans: Sequence[tuple[float, float]], names: Sequence[str]
) -> None:
    """Write each name near its point, with a thin line to it where it had to go far; the layout must be final.

    Names go, from the top down, to the nearest place inside the axes that covers no name, point or span (the ends, in
    y, of a line through each point); of equally near ones right before left before above and below. Where no place is
    free, the first one is taken.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure, pixels = axes.figure, axes.transData.transform
    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    scale = figure.dpi / 72
    inside, radius = axes.get_window_extent(renderer), _NEAR * scale
    taken = [Bbox([pixels(point), pixels(point)]).padded(radius) for point in points]
    for (x, _), ends in zip(points, spans, strict=True):
        taken.append(Bbox([pixels((x, end)) for end in ends]).padded(scale, 0))
    for point, name in sorted(zip(points, names, strict=True), key=lambda named: -named[0][1]):
        text = axes.annotate(
            literal(name), point, (0, 0), textcoords="offset points", va="bottom", size=9, color="#333333", zorder=4
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        start = text.get_window_extent(renderer).padded(2 * scale, scale)
        places = {
            offset: start.translated(*(scale * part for part in offset))
            for offset in _offsets(start.width / scale, start.height / scale)
        }
        free = (
            offset
            for offset, place in places.items()
            if inside.contains(*place.min) and inside.contains(*place.max) and not place.count_overlaps(taken)
        )
        offset = next(free, next(iter(places)))
        text.set_position(offset)
        taken.append(place := places[offset])
        x, y = pixels(point)
        end = (min(max(x, place.x0), place.x1), min(max(y, place.y0), place.y1))
        if math.dist((x, y), end) > 1.8 * radius:
            line = axes.transData.inverted().transform([(x, y), end])
            axes.plot(*line.T, color="#999999", linewidth=0.6, zorder=1, scalex=False, scaley=False)


def _offsets(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Yield how far a text of this size moves from its start at its point, in points, the nearest place first."""
    for distance in range(6, 240, 6):
        for degrees in (0, 180, 90, 270, 30, -30, 150, 210, 60, -60, 120, 240):
            across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            # The edge or corner that faces the point lies at the distance.
            left = -width / 2 + across * width / 2 + across * distance
            yield left + 2, -height / 2 + up * height / 2 + up * distance + 1
