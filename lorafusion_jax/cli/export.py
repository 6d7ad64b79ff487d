"""`lorafusion export`: a fused run, or one adapter of a pool, in the hub's formats."""

from collections.abc import Sequence

from ..runs.export import ExportOptions, export
from .parsing import parse


def main(arguments: Sequence[str]) -> None:
    """Write what the options ask for."""
    export(parse(ExportOptions, arguments, "export"))
