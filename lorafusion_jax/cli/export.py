"""`lorafusion export`: write a fused run, or one adapter of a pool, in the hub's formats."""

from collections.abc import Sequence

from ..runs.export import ExportOptions, export
from ..support.reading import show
from .parsing import parse


def main(arguments: Sequence[str]) -> None:
    """Write the export that the options describe, and print what was written."""
    options = parse(ExportOptions, arguments, "export")
    show(f"{export(options)}\nwritten to {options.out}")
