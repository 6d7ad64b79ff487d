"""A progress bar on stderr, in the first process: live on a terminal, one line a minute in a log."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from tqdm import tqdm

_MINUTE = 60.0  # seconds


def progress(
    what: str, of: int | Sequence, done: int = 0, *, unit: str = "it"
) -> "tqdm":
    """Return a tqdm bar of so many units, or one that yields a sequence's items, that starts at `done`.

    Where stderr is no terminal, nothing is written of what takes less than a minute.
    """
    from tqdm import tqdm

    in_log = {
        "mininterval": _MINUTE,
        "maxinterval": _MINUTE,
        "delay": _MINUTE,
        "ascii": True,
    }
    how: dict[str, Any] = {"leave": False} if sys.stderr.isatty() else in_log
    items, total = (None, of) if isinstance(of, int) else (of, len(of))
    return tqdm(
        items,
        desc=what,
        total=total,
        initial=done,
        unit=unit,
        disable=jax.process_index() > 0,
        **how,
    )
