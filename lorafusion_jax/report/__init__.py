"""Result rows, their statistics, and the tables, plots and pages made from them."""

from .files import write_text
from .plots import plot_accuracy, plot_coefficients, plot_learning_curves
from .rows import Row, append_rows, done, merge, read_rows
from .scores import Scores, scores
from .spread import markdown_table
from .statistics import Paired, Summary, paired, summary

__all__ = [
    "Paired",
    "Row",
    "Scores",
    "Summary",
    "append_rows",
    "done",
    "markdown_table",
    "merge",
    "paired",
    "plot_accuracy",
    "plot_coefficients",
    "plot_learning_curves",
    "read_rows",
    "scores",
    "summary",
    "write_text",
]
