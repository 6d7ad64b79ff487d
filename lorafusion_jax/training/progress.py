"""A progress bar on stderr: only on a terminal, and only in the first process."""

from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from tqdm import tqdm


def progress(what: str, total: int, done: int = 0) -> "tqdm":
    """Return a tqdm bar of `total` units that starts at `done`."""
    from tqdm import tqdm

    hidden = True if jax.process_index() else None  # None: shown on a terminal only
    return tqdm(desc=what, total=total, initial=done, disable=hidden, leave=False)
