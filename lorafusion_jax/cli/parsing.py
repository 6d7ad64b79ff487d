"""From arguments to the dataclass of a subcommand's options."""

import inspect
from collections.abc import Sequence
from typing import TypeVar

Options = TypeVar("Options")


def parse(options: type[Options], arguments: Sequence[str], name: str) -> Options:
    """Return the options that the arguments give; the docstring of their class is the help text.

    Args:
      options: a dataclass.
      arguments: those after the subcommand.
      name: of the subcommand.
    """
    import tyro

    description = inspect.cleandoc(options.__doc__ or "").partition("\nAttributes:")[0]
    return tyro.cli(options, args=list(arguments), prog=f"lorafusion {name}", description=description)
