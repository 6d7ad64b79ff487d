"""Tables of the pages in docs, and of CSV files."""

import csv
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path


def assert_written(
    tables: Mapping[str, Sequence[Sequence[str]]], folder: Path, prefix: str = ""
) -> None:
    """Check that the folder's CSV files have these tables."""
    for name, lines in tables.items():
        assert (
            list(csv.reader((folder / f"{prefix}{name}.csv").read_text().splitlines()))
            == lines
        ), name


def rows_below(page: Path, header: Sequence[str]) -> list[list[str]]:
    """Return the rows of the page's table with this header; the page must have it."""
    head = f"| {' | '.join(header)} |"
    lines = page.read_text().splitlines()
    assert head in lines, f"{page} has no table with the header {head}"
    rows = takewhile(lambda line: line.startswith("|"), lines[lines.index(head) + 2 :])
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in rows]
