"""Plots as PNG, in one style: the methods' means, and those that a caller draws.

They raise ValueError without results, or if matplotlib is not installed.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..support.checks import load_optional
from ..support.text import printable
from ..support.writing import write
from .statistics import Summary

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


load_matplotlib = partial(
    load_optional, "matplotlib", extra="plots", needed_by="a plot"
)


def plot(
    path: Path, size: tuple[float, float], draw: Callable[["Figure"], None]
) -> None:
    """Write a figure, of a size in inches, as PNG; raise ValueError if matplotlib is not installed."""
    matplotlib = load_matplotlib()
    from matplotlib.figure import Figure

    # Not pyplot: a separate figure leaves no state behind.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(size, dpi=150, layout="constrained")
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda file: figure.savefig(file, format="png"))


def plot_means(
    summaries: Mapping[str, Summary], path: Path, *, title: str = ""
) -> None:
    """Draw the mean exact match of each method as a dot with its 95 % interval, the first method on top."""
    if not summaries:
        raise ValueError("there are no means to draw: give results of a method")

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        shade = colour(3)
        for position, summary in enumerate(summaries.values()):
            axes.hlines(position, summary.low, summary.high, color=shade, linewidth=2)
            axes.plot(summary.mean, position, "o", color=shade, markersize=6)
            margin = axes.get_yaxis_transform()
            axes.text(
                1.01,
                position,
                f"{summary.mean:.1f}",
                transform=margin,
                va="center",
                color="#333333",
                size=10,
            )
        axes.set_yticks(range(len(summaries)), [*map(literal, summaries)])
        axes.set_ylim(len(summaries) - 0.4, -0.6)
        axes.set_xlim(
            0, 1.04 * max(summary.high for summary in summaries.values()) or 1
        )
        axes.grid(visible=True, axis="both")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("exact match, %, with 95 % interval")
        figure.suptitle(title, x=0.01, ha="left", size=12)

    plot(path, (6.0, 0.3 * len(summaries) + 1.2), draw)
