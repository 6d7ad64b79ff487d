"""Compiled programs of a long process, such as a matrix of runs.

On a CPU every program that JAX compiles takes several mappings of memory; Linux allows a process 65,530 of them by
default. Past that LLVM ends the process, or whatever asks for memory next fails.
"""

from pathlib import Path

import jax

_LIMIT = Path("/proc/sys/vm/max_map_count")
_MAPPINGS = Path("/proc/self/maps")


def make_room() -> bool:
    """Forget all compiled programs where the process has taken more than half of its mappings; say if it did.

    What is needed again is compiled again, or read from JAX's persistent cache where that is on.
    """
    if not (_LIMIT.is_file() and _MAPPINGS.is_file()):
        return False
    with _MAPPINGS.open("rb") as file:
        taken = sum(1 for _ in file)
    if 2 * taken <= int(_LIMIT.read_text()):
        return False
    jax.clear_caches()
    return True
