"""The first import of every script: Ctrl-C and SIGTERM are handled during its other imports, which take seconds."""

from pathlib import Path

import __main__
from lorafusion_jax.cli import run
from lorafusion_jax.support import interrupts

__all__ = ["run"]

if (
    Path(getattr(__main__, "__file__", "")).resolve().parent
    == Path(__file__).resolve().parent
):
    interrupts.watch()
