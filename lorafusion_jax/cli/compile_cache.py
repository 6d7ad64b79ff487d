"""The folder in which JAX keeps compiled functions of commands, set before JAX is loaded."""

import contextlib
import hashlib
import importlib.metadata
import os
import re
import stat
import sys
import warnings
from pathlib import Path
from typing import Any

# JAX can bound the cache too, but then reads the times of all entries before it writes one: 0.1 s for 3,000.
_MOST_BYTES = 1 << 30
_UNREADABLE = re.compile(
    r"Error reading persistent compilation cache entry for '(\w+)'"
)


def keep_compiled() -> None:
    """Let JAX keep compiled functions between runs, unless a variable of the environment does or forbids it.

    JAX runs what its cache holds unchecked. A folder that others may open, or another user's, is left alone.
    """
    # Every program costs more to compile than to read.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if {
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_ENABLE_COMPILATION_CACHE",
    } & os.environ.keys():
        return
    try:
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if (
            not stat.S_ISDIR(status.st_mode)
            or status.st_uid != os.geteuid()
            or status.st_mode & 0o077
        ):
            print(
                f"{folder} is not private to you: compiled functions are not kept. Remove it",
                file=sys.stderr,
            )
            return
        _prune(folder)
    except (OSError, RuntimeError):  # a home that cannot be written to, or none
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    _mend(folder)


def _features() -> list[str]:
    """Return what the processor can do, as Linux names it; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return sorted(
        next(
            (line for line in lines if line.lower().startswith(("flags", "features"))),
            "",
        ).split()
    )


def _folder() -> Path:
    """Return the folder of this version of JAX, on processors with the same instructions."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    cache = (
        Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    )  # as the XDG specification has it
    features = hashlib.sha256(" ".join(_features()).encode()).hexdigest()[:8]
    return (
        cache
        / "lorafusion-jax"
        / f"jaxlib-{importlib.metadata.version('jaxlib')}-{os.uname().machine}-{features}"
    )


def _prune(folder: Path) -> None:
    """Remove the oldest entries above the bound, by the time of their last use as far as the disk keeps it."""
    entries = []
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(
            FileNotFoundError
        ):  # another command removes entries too
            s = path.stat()
            entries.append((max(s.st_atime, s.st_mtime), s.st_size, path))
    for _, size, path in sorted(entries, reverse=True):
        total += size
        if total > _MOST_BYTES and path.is_file():
            path.unlink(missing_ok=True)


def _mend(folder: Path) -> None:
    """Remove an entry that JAX cannot read, instead of its warning: JAX compiles again, but replaces no entry."""
    show = warnings.showwarning

    def shown(message: Warning | str, *details: Any, **further: Any) -> None:
        if (damaged := _UNREADABLE.match(str(message))) is None:
            show(message, *details, **further)
            return
        for entry in folder.glob(f"{damaged[1]}-*"):
            entry.unlink(missing_ok=True)

    warnings.showwarning = shown
    warnings.filterwarnings("always", _UNREADABLE.pattern)
