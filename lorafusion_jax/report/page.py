"""A folder of results: tables as CSV, and one HTML page with its figures, which needs no other file."""

import base64
import csv
import html
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..support.writing import write_text
from .formats import Table

# Dark mode turns the plots' lightness around and keeps their hues.
_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --line: #d9dce0; --band: #f4f5f7; --soft: #5d646d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --paper: #15171a; --line: #383d43; --band: #1e2125; --soft: #a0a7b0; }
  figure img { filter: invert(0.9137) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 84rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; }
p, caption { max-width: 46rem; }
.wide { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.5rem; position: sticky; left: 0; width: max-content;
  max-width: min(46rem, calc(100vw - 2rem)); white-space: normal; }
th, td { padding: 0.3rem 0.5rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
.number { text-align: right; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; white-space: normal; }
th:first-child { position: sticky; left: 0; background: var(--paper); }
tbody th { font-weight: 500; }
tbody tr:hover > * { background: var(--band); }
figure { margin: 1.5rem 0; }
figure img { width: 100%; max-width: 40rem; height: auto; display: block; }
"""
# The headings' endings in CSV, for each number of a cell, by the kind of a column.
_PARTS = {
    "spread": ("", " sd"),
    "interval": (" low", " high"),
    "nats interval": (" low", " high"),
    "counts": (" min", " max"),
}


def write_report(
    folder: Path,
    title: str,
    tables: Mapping[str, Table],
    figures: Mapping[str, str],
    *,
    text: str = "",
) -> None:
    """Write NAME.csv for each table, and report.html, a page that needs no other file.

    Args:
      folder: made if it does not exist.
      title: title of the page.
      tables: tables by name, in the order of the page.
      figures: file names of PNG files in the folder (see `plot`), with what they show in words.
      text: introduction; an empty line starts a paragraph.

    Raises:
      WriteError: the folder cannot be written to.
    """
    paragraphs = "".join(
        f"<p>{html.escape(part.strip())}</p>\n"
        for part in re.split(r"\n\s*\n", text)
        if part.strip()
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or the browser requests one
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n{paragraphs}{''.join(map(_html, tables.values()))}"
        f"{''.join(_figure(folder / name, shown) for name, shown in figures.items())}"
        "</main>\n</body>\n</html>\n"
    )
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", _csv(table))
    write_text(folder / "report.html", page)


def _csv(table: Table) -> str:
    """Return CSV with numbers as they are: a column for each number of a cell, lines ended by a newline."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = [_PARTS.get(column.kind, ("",)) for column in table.columns]
    writer.writerow(
        [
            column.name + part
            for column, column_parts in zip(table.columns, parts, strict=True)
            for part in column_parts
        ]
    )
    for line in table.lines:
        numbers: list[Any] = []
        for column_parts, cell in zip(parts, line, strict=True):
            if cell is None:
                numbers += [None] * len(column_parts)
            else:
                numbers += [cell] if len(column_parts) == 1 else cell
        writer.writerow(
            [
                f"{number:.6g}" if isinstance(number, float) else number
                for number in numbers
            ]
        )
    return text.getvalue()


def _html(table: Table) -> str:
    """Return a table with scopes of headings, in a box that scrolls sideways."""
    first, *lines = table.texts
    numeric = [
        ' class="number"' if column.kind != "text" else "" for column in table.columns
    ]
    names = [
        html.escape(name).replace("_", "_<wbr>") for name in first
    ]  # where a long name may break
    head = "".join(
        f'<th scope="col"{c}>{name}</th>'
        for c, name in zip(numeric, names, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{html.escape(line[0])}</th>'
        + "".join(
            f"<td{c}>{html.escape(cell)}</td>"
            for c, cell in zip(numeric[1:], line[1:], strict=True)
        )
        + "</tr>\n"
        for line in lines
    )
    return (
        f'<div class="wide" tabindex="0"><table>\n<caption>{html.escape(table.caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def _figure(path: Path, shown: str) -> str:
    image = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{image}" alt="{html.escape(shown)}"></figure>\n'
