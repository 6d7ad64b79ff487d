"""Names next to the points of a plot, placed so that no two texts overlap."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .figure import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINT = 5.0  # radius in points around a point that texts keep off


def label_points(
    axes: "Axes", points: Sequence[tuple[float, float]], spans: Sequence[tuple[float, float]], names: Sequence[str]
) -> None:
    """Write each name near its point, with a thin line to it where it had to go far; the layout must be final.

    Names go, from the top down, to the nearest place inside the axes that covers no name, point or span; of equally
    near ones right before left before above and below. Where no place is free, the first one is taken.

    Args:
      axes: where the points are, in its data coordinates.
      points: x and y of each.
      spans: the ends, in y, of a line through each point.
      names: names of the points.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure, pixels = axes.figure, axes.transData.transform
    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    scale = figure.dpi / 72
    inside, radius = axes.get_window_extent(renderer), _POINT * scale
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
