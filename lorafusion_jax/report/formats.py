"""A table of results, and its Markdown. The kind of a column determines how its cells are written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from ..support import text_tables


class Column(NamedTuple):
    """A heading, and the kind of the cells below: a key of `_KINDS`."""

    name: str
    kind: str


@dataclass(frozen=True)
class Table:
    """Columns, lines of as many cells (None: empty), and a caption. The first column names the lines."""

    caption: str
    columns: Sequence[Column]
    lines: Sequence[Sequence[Any]]

    def __post_init__(self):
        for line in self.lines:
            if len(line) != len(self.columns):
                raise ValueError(
                    f"a line has {len(line)} cells: expected {len(self.columns)}, got {line}"
                )

    @property
    def texts(self) -> list[list[str]]:
        """Headings, then the cells of every line, as they are read."""
        kinds = [_KINDS[column.kind] for column in self.columns]
        lines = (zip(kinds, line, strict=True) for line in self.lines)
        cells = [
            [text_tables.EMPTY if cell is None else kind(cell) for kind, cell in line]
            for line in lines
        ]
        return [[column.name for column in self.columns], *cells]


def markdown(table: Table) -> str:
    """Return the caption and a table with columns in line."""
    lines = [[*map(text_tables.escaped, line)] for line in table.texts]
    return f"{text_tables.escaped(table.caption)}\n\n{text_tables.markdown(lines)}"


def spread(cell: tuple[float, float | None]) -> str:
    """Return a mean and a standard deviation, if there is one, as text."""
    mean, std = cell
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def counts(cell: tuple[int, int]) -> str:
    """Return the ends of a range as text, once if they are equal."""
    low, high = cell
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _signed(cell: float, digits: int) -> str:
    if round(cell, digits):
        return f"{cell:+.{digits}f}".replace("-", "−")
    return f"{0:.{digits}f}"


def _interval(cell: tuple[float, float], digits: int) -> str:
    return " to ".join(
        f"{round(end, digits) + 0.0:.{digits}f}".replace("-", "−") for end in cell
    )


_KINDS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "spread": spread,
    "interval": partial(_interval, digits=1),
    "percent": "{:.1f}".format,
    "points": partial(_signed, digits=1),
    "nats": "{:.3f}".format,
    "more nats": partial(_signed, digits=3),
    "nats interval": partial(_interval, digits=3),
    "count": "{:,.0f}".format,
    "counts": counts,
    "seconds": "{:,.1f}".format,
    "p": lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}",
}
