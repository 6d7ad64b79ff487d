"""Shared parts of all plots: style, colours, and a figure that becomes a whole PNG file."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import printable, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def colour(i: int) -> str:
    """Return the colour of the i-th method."""
    return _COLOURS[i % len(_COLOURS)]


def literal(name: str) -> str:
    """Return a name that matplotlib draws as it is: dollar signs would start a formula."""
    return printable(name).replace("$", r"\$")


def plot(path: Path, size: tuple[float, float], draw: Callable[["Figure"], None]) -> None:
    """Write a figure, of a size in inches, as PNG; raise ValueError if matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"plots need {error.name}, which is not installed: pip install -e '.[plots]'") from error
    # Not pyplot: a separate figure draws with Agg and leaves no state behind.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)  # which can measure texts before they are drawn
        draw(figure)
        write(path, lambda partial: figure.savefig(partial, format="png"))
