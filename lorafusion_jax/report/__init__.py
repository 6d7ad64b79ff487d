"""Result rows, their statistics, and the tables and plots made from them."""

# ruff: noqa: F401 (the imports are the public names)

from ..files import write_text
from .formats import Column, Table, csv_text, markdown
from .plots import plot_accuracy, plot_coefficients, plot_learning_curves, plot_means
from .rows import Row, append_rows, done, merge, read_rows
from .scores import Scores, scores
from .spread import markdown_table
from .statistics import OverTasks, Paired, Summary, over_tasks, paired, summary
from .tables import best_method, main_tables, paired_table
