"""`lorafusion compare`: print the means of runs with intervals, and their paired differences."""

from collections.abc import Sequence

from ..report import markdown
from ..runs.compare import CompareOptions, compare
from ..support.reading import show
from .parsing import parse


def main(arguments: Sequence[str]) -> None:
    """Print two Markdown tables."""
    options = parse(CompareOptions, arguments, "compare")
    show("\n\n".join(markdown(table).strip() for table in compare(options)))
    if options.plot is not None:
        show(f"written to {options.plot}")
