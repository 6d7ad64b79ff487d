"""`lorafusion merge`: combine modules of a pool with given weights."""

from collections.abc import Sequence

from ..runs.merge import MergeOptions, merge
from ..support.reading import show
from .parsing import parse


def main(arguments: Sequence[str]) -> None:
    """Write the combination that the options describe, and print what was written."""
    options = parse(MergeOptions, arguments, "merge")
    show(f"{merge(options)}\nwritten to {options.out}")
