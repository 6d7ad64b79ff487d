"""A table of results as LaTeX, HTML and CSV."""

import csv
import html
import io
from typing import Any

from lorafusion_jax.report import Table

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "\n": " ",
}
# The headings' endings in CSV, for each number of a cell, by the kind of a column.
_PARTS = {
    "spread": ("", " sd"),
    "interval": (" low", " high"),
    "nats interval": (" low", " high"),
    "counts": (" min", " max"),
}


def latex(table: Table) -> str:
    """Return a table for LaTeX with the booktabs package."""
    first, *lines = [" & ".join(map(_latex, line)) + r" \\" for line in table.texts]
    alignment = "".join("l" if column.kind == "text" else "r" for column in table.columns)
    body = "\n".join(lines)
    return rf"""% needs \usepackage{{booktabs}}
\begin{{table}}
\centering
\caption{{{_latex(table.caption)}}}
\begin{{tabular}}{{{alignment}}}
\toprule
{first}
\midrule
{body}
\bottomrule
\end{{tabular}}
\end{{table}}
"""


def html_table(table: Table) -> str:
    """Return an HTML table with scopes of headings, in a box that scrolls sideways."""
    first, *lines = table.texts
    numeric = [' class="number"' if column.kind != "text" else "" for column in table.columns]
    names = [html.escape(name).replace("_", "_<wbr>") for name in first]  # where a long name may break
    head = "".join(f'<th scope="col"{c}>{name}</th>' for c, name in zip(numeric, names, strict=True))
    body = "".join(
        f'<tr><th scope="row">{html.escape(line[0])}</th>'
        + "".join(f"<td{c}>{html.escape(cell)}</td>" for c, cell in zip(numeric[1:], line[1:], strict=True))
        + "</tr>\n"
        for line in lines
    )
    return (
        f'<div class="wide" tabindex="0"><table>\n<caption>{html.escape(table.caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def csv_text(table: Table) -> str:
    """Return CSV with numbers as they are: a column for each number of a cell, lines ended by a newline."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = [_PARTS.get(column.kind, ("",)) for column in table.columns]
    writer.writerow([column.name + part for column, of in zip(table.columns, parts, strict=True) for part in of])
    for line in table.lines:
        numbers: list[Any] = []
        for of, cell in zip(parts, line, strict=True):
            numbers += [None] * len(of) if cell is None else [cell] if len(of) == 1 else cell
        writer.writerow([f"{number:.6g}" if isinstance(number, float) else number for number in numbers])
    return text.getvalue()


def _latex(text: str) -> str:
    return text.translate(str.maketrans(_LATEX))
