"""`lorafusion compare`: print the means of runs with intervals, and their paired differences."""

from collections.abc import Sequence

from ..report import markdown
from ..runs.compare import CompareOptions, compare
from .parsing import parse


def main(arguments: Sequence[str]) -> None:
    """Print two Markdown tables."""
    options = parse(CompareOptions, arguments, "compare")
    print("\n\n".join(markdown(table).strip() for table in compare(options)))
    if options.plot is not None:
        print(f"written to {options.plot}")
