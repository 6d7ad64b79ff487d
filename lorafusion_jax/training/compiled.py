"""Compiled programs of a long process, such as a matrix of runs.

On a CPU every program takes several mappings of memory. At Linux's limit, by default 65,530 mappings, LLVM ends the
process or the next allocation fails.
"""

from pathlib import Path

import jax

_LIMIT = Path("/proc/sys/vm/max_map_count")
_MAPPINGS = Path("/proc/self/maps")


def make_room(limit: int | None = None) -> bool:
    """Forget all compiled programs if the process has more than half of its mappings; return whether it did."""
    if not (_LIMIT.is_file() and _MAPPINGS.is_file()):
        return False
    with _MAPPINGS.open("rb") as file:
        taken = sum(1 for _ in file)
    if 2 * taken <= (limit or int(_LIMIT.read_text())):
        return False
    jax.clear_caches()
    return True
