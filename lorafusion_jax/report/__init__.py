"""Statistics of result rows, and the tables and plots made from them."""

# ruff: noqa: F401 (the imports are the public names)

from ..support.text_tables import EMPTY, escaped, markdown as as_markdown
from ..support.writing import write_text
from .formats import Column, Table, counts, markdown, spread
from .page import write_report
from .plots import colour, literal, plot, plot_means
from .statistics import (
    Interval,
    Paired,
    Sample,
    Summary,
    holm,
    over_tasks,
    paired,
    spread as spread_over_seeds,
    summary,
)
