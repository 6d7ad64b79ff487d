"""Plots as PNG, in one style: the methods' means, and those that a caller draws.

They raise ValueError without results, or if matplotlib is not installed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..support.checks import load_optional
from ..support.text import printable
from ..support.writing import write
from .statistics import Interval, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind eyes, without its yellow, too light for lines on white.
_COLOURS = (
    "#999999",
    "#E69F00",
    "#56B4E9",
    "#0072B2",
    "#CC79A7",
    "#D55E00",
    "#009E73",
    "#000000",
)
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


def colour(i: int) -> str:
    """Return the colour of the i-th method."""
    return _COLOURS[i % len(_COLOURS)]


def literal(name: str) -> str:
    """Return a name that matplotlib draws as it is: dollar signs would start a formula."""
    return printable(name).replace("$", r"\$")


def plot(
    path: Path, size: tuple[float, float], draw: Callable[["Figure"], None]
) -> None:
    """Write a figure, of a size in inches, as PNG; raise ValueError if matplotlib is not installed."""
    matplotlib = load_optional("matplotlib", extra="plots", needed_by="a plot")
    from matplotlib.figure import Figure

    # Not pyplot: a separate figure leaves no state behind.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(size, dpi=150, layout="constrained")
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda file: figure.savefig(file, format="png"))


def plot_means(
    means: Mapping[str, Summary | Interval],
    path: Path,
    *,
    title: str = "",
    label: str = "exact match, %, with 95 % interval",
    digits: int = 1,
) -> None:
    """Draw each mean as a dot with its interval, the first one on top, above the label of the axis."""
    if not means:
        raise ValueError("there are no means to draw: give results of a method")

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        shade = colour(3)
        margin = axes.get_yaxis_transform()
        for position, mean in enumerate(means.values()):
            axes.hlines(position, mean.low, mean.high, color=shade, linewidth=2)
            axes.plot(mean.mean, position, "o", color=shade, markersize=6)
            axes.text(
                1.01,
                position,
                f"{mean.mean:.{digits}f}",
                transform=margin,
                va="center",
                color="#333333",
                size=10,
            )
        axes.set_yticks(range(len(means)), [*map(literal, means)])
        axes.set_ylim(len(means) - 0.4, -0.6)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.grid(visible=True, axis="both")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        figure.suptitle(literal(title), x=0.01, ha="left", size=12)

    plot(path, (6.0, 0.3 * len(means) + 1.2), draw)
