"""Tables of the pages in docs."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path


def rows_below(page: Path, header: Sequence[str]) -> list[list[str]]:
    """Return the rows of the page's table with this header; the page must have it."""
    head = f"| {' | '.join(header)} |"
    lines = page.read_text().splitlines()
    assert head in lines, f"{page} has no table with the header {head}"
    rows = takewhile(lambda line: line.startswith("|"), lines[lines.index(head) + 2 :])
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in rows]
