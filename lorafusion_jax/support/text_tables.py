"""Tables as text: cells padded to the width of their columns."""

import re
from collections.abc import Collection, Sequence

from .text import one_line

EMPTY = "–"  # a cell without a value
# Characters that end a line or a cell, or start emphasis, code, a link or a tag.
_BREAKS = re.compile(r"[\n\r\v\f\x85\u2028\u2029]")
_MARKUP = re.compile(r"[\\|*`\[]|<(?=\S)")


def padded(
    lines: Sequence[Sequence[str]], *, left: Collection[int] = (0,)
) -> list[list[str]]:
    """Return the cells of every line, padded to the width of their column.

    Args:
      lines: rows with the same number of cells.
      left: numbers of the columns that are aligned left; the others are aligned right.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        [
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]


def plain(lines: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Return a table for a terminal, each of whose rows is one line; the arguments are those of `padded`."""
    cells = [[one_line(cell) for cell in line] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded(cells, left=left))


def markdown(lines: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Return a Markdown table whose first line is its heading; the arguments are those of `padded`."""
    head, *rest = padded(lines, left=left)
    rule = [
        "-" * len(cell) if i in left else "-" * (len(cell) - 1) + ":"
        for i, cell in enumerate(head)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rest))


def escaped(text: str) -> str:
    """Return a text for Markdown that stays on its line and in its cell, without links, code and tags."""
    return _BREAKS.sub(" ", _MARKUP.sub(r"\\\g<0>", text))
