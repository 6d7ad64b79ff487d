"""`lorafusion export`, `merge` and `compare`: what is made of complete runs and of modules."""

from collections.abc import Sequence

from ..report import markdown
from ..runs.compare import CompareOptions, compare
from ..runs.export import ExportOptions, MergeOptions, export, merge
from ..support.reading import show
from .parsing import parse


def export_command(arguments: Sequence[str]) -> None:
    """Write a run, an adapter or a base, and print what was written."""
    options = parse(ExportOptions, arguments, "export")
    show(f"{export(options)}\nwritten to {options.out}")


def merge_command(arguments: Sequence[str]) -> None:
    """Write the combination that the options describe, and print what was written."""
    options = parse(MergeOptions, arguments, "merge")
    show(f"{merge(options)}\nwritten to {options.out}")


def compare_command(arguments: Sequence[str]) -> None:
    """Print a Markdown table of the means of runs, and one of their paired differences."""
    options = parse(CompareOptions, arguments, "compare")
    show("\n\n".join(markdown(table).strip() for table in compare(options)))
    if options.plot is not None:
        show(f"written to {options.plot}")
