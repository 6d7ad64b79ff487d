"""One HTML page of results that needs nothing else: tables as plain markup, plots inside as PNG."""

import base64
import html
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lorafusion_jax.report import Row, Scores, best_method, main_tables, paired_table, plot_means, scores, shots_name

from .formats import html_table
from .provenance import config_tables, origin_tables

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
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 3rem; font-size: 1.25rem; }
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
summary { cursor: pointer; }
"""


def page(rows: Sequence[Row], title: str, text: str = "", *, reference: str | None = None) -> str:
    """Return an HTML page: for each number of shots tables and plots, then settings, data, versions and devices.

    Args:
      rows: the results, of one number of shots or several.
      title: of the page.
      text: introduction; an empty line starts a paragraph.
      reference: the method that is compared with every other; as a rule the one with the highest mean.

    Raises:
      ValueError: there are no rows, or none of a reference with these shots; matplotlib is not installed.
    """
    paragraphs = "".join(f"<p>{html.escape(part.strip())}</p>\n" for part in re.split(r"\n\s*\n", text) if part.strip())
    parts = "".join(_section(results, reference) for results in scores(rows))
    differing, shared = config_tables(rows)
    settings = html_table(differing) if differing.lines else "<p>All results have the same settings.</p>\n"
    if shared.lines:
        settings += f"<details><summary>{html.escape(shared.caption)}</summary>{html_table(shared)}</details>\n"
    origins = "".join(html_table(table) for table in origin_tables(rows))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or the browser requests one
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n{paragraphs}{parts}"
        f"<h2>Settings</h2>\n{settings}<h2>Data, versions, devices</h2>\n{origins}</main>\n</body>\n</html>\n"
    )


def save_means(results: Scores, path: Path) -> None:
    """Write the plot of means as PNG.

    Raises:
      ValueError: no method has every task; matplotlib is not installed.
    """
    plot_means(results, path, title=f"{len(results.tasks)} tasks, {shots_name(results.shots)}")


def _section(results: Scores, reference: str | None) -> str:
    name = shots_name(results.shots)
    parts = [f"<h2>{html.escape(name[0].upper() + name[1:])}</h2>\n", *map(html_table, main_tables(results))]
    if any(results.summaries.values()):
        parts.append(_figure(results))
    else:
        parts.append("<p>No method has results of all tasks yet, so there are no means to draw.</p>\n")
    if len(results.methods) > 1:
        parts.append(html_table(paired_table(results, reference or best_method(results))))
    return "".join(parts)


def _figure(results: Scores) -> str:
    with tempfile.TemporaryDirectory() as folder:
        save_means(results, path := Path(folder) / "means.png")
        image = base64.b64encode(path.read_bytes()).decode()
    alt = "Mean exact match of each method with its 95 % interval"
    return f'<figure><img src="data:image/png;base64,{image}" alt="{alt}"></figure>\n'
