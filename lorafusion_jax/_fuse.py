"""A run, digitally or on simulated chips."""

from typing import Any

from .hardware.on_arrays import on_arrays
from .runs.options import FuseOptions
from .runs.run import run


def fuse(options: FuseOptions) -> dict[str, Any]:
    """Do the run that the options describe, and return the results as they are in results.json.

    Raises:
      ValueError: before anything is written, on options or files that cannot be used.
    """
    return run(options, None if options.arrays.crossbar is None else on_arrays)
