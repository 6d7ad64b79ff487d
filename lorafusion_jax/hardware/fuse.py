"""A run, digitally or on simulated chips."""

from typing import Any

from ..runs.options import FuseOptions
from ..runs.run import run
from .on_arrays import on_arrays


def fuse(options: FuseOptions) -> dict[str, Any]:
    """Do the run that the options describe, and return the results as they are in results.json.

    Raises:
      ValueError: before anything is written, on options or files that cannot be used.
    """
    return run(options, None if options.arrays.crossbar is None else on_arrays)
