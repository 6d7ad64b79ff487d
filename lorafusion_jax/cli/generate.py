"""`lorafusion generate`: print a fused run's answers to new text."""

from collections.abc import Sequence

from ..runs.apply import GenerateOptions, generate_lines
from .parsing import parse


def main(arguments: Sequence[str]) -> None:
    """Print an answer for each line of text."""
    for line in generate_lines(parse(GenerateOptions, arguments, "generate")):
        print(line)
