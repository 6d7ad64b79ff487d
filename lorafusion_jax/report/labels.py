"""Names next to the points of a plot, placed so that no two texts overlap."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .figure import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_POINT = 5.0  # radius in points around a point that texts keep off
_INK = "#333333"


def label_points(
    axes: "Axes",
    points: Sequence[tuple[float, float]],
    spans: Sequence[tuple[float, float]],
    names: Sequence[str],
) -> "list[Annotation]":
    """Write each name near its point, with a thin line to it where it had to go far; call it when the layout stands.

    Names go, from the top down, to the nearest place inside the axes that covers no name, point or span; of equally
    near ones right before left before above and below. Where no place is free, the one that covers least is taken.

    Args:
      axes: where the points are, in its data coordinates.
      points: x and y of each.
      spans: from and to which y a line through each point goes.
      names: what to write.
    """
    from matplotlib.patheffects import withStroke

    figure = axes.figure
    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    scale = figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    placed = []
    radius = _POINT * scale
    taken = []
    for (x, y), ends in zip(points, spans, strict=True):
        across, up = axes.transData.transform((x, y))
        low, high = (axes.transData.transform((x, end))[1] for end in ends)
        taken.append(_box(across - radius, up - radius, 2 * radius, 2 * radius))
        taken.append(_box(across - scale, low, 2 * scale, high - low))
    for point, name in sorted(zip(points, names, strict=True), key=lambda named: -named[0][1]):
        text = axes.annotate(
            literal(name), point, (0, 0), textcoords="offset points", va="bottom", size=9, color=_INK, zorder=4
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        x, y = axes.transData.transform(point)
        extent = text.get_window_extent(renderer)
        width, height = extent.width + 4 * scale, extent.height + 2 * scale
        best, least = (0.0, 0.0), math.inf
        for dx, dy in _places(width / scale, height / scale):
            place = _box(x + dx * scale, y + dy * scale, width, height)
            covered = sum(_shared(place, other) for other in taken) + _outside(place, inside)
            if covered < least:
                best, least = (dx, dy), covered
            if covered == 0:
                break
        taken.append(_box(x + best[0] * scale, y + best[1] * scale, width, height))
        text.set_position((best[0] + 2, best[1] + 1))
        _connect(axes, (x, y), taken[-1], 1.8 * radius)
        placed.append(text)
    return placed


def _places(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Yield offsets of the lower left corner of a text from its point, in points, the nearest first."""
    for distance in range(6, 240, 6):
        for degrees in (0, 180, 90, 270, 30, -30, 150, 210, 60, -60, 120, 240):
            across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            # The edge or corner that faces the point lies at the distance.
            left = -width / 2 + across * width / 2 + across * distance
            yield left, -height / 2 + up * height / 2 + up * distance


def _connect(axes: "Axes", point: tuple[float, float], box: "Bbox", near: float) -> None:
    x, y = point
    end = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
    if math.dist(point, end) > near:
        line = axes.transData.inverted().transform([point, end])
        axes.plot(*line.T, color="#999999", linewidth=0.6, zorder=1, scalex=False, scaley=False)


def _box(left: float, bottom: float, width: float, height: float) -> "Bbox":
    from matplotlib.transforms import Bbox

    return Bbox.from_bounds(left, bottom, width, height)


def _shared(one: "Bbox", other: "Bbox") -> float:
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    up = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, across) * max(0.0, up)


def _outside(place: "Bbox", inside: "Bbox") -> float:
    return place.width * place.height - _shared(place, inside)
