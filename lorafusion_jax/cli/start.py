"""The environment of a command, set before it loads JAX: memory and compiled functions that are kept, wide vectors."""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import stat
import sys
import warnings
from pathlib import Path
from typing import Any

# JAX can bound the cache too, but then reads the times of all entries before it writes one: 0.1 s for 3,000.
_MOST_BYTES = 1 << 30
_WIDTH = "--xla_cpu_prefer_vector_width"
_UNREADABLE = re.compile(
    r"Error reading persistent compilation cache entry for '(\w+)'"
)

# glibc would map the temporaries of every call anew and give them back. One arena that maps nothing keeps them: other
# arenas are too small for them.
_KEEPING = {"hugetlb": 1, "arena_max": 1, "mmap_max": 0, "trim_threshold": 1 << 40}
MALLOC = ":".join(f"glibc.malloc.{name}={value}" for name, value in _KEEPING.items())


def keep_memory() -> None:
    """Start this process again with a malloc that keeps memory, if JAX will compute on a CPU under Linux.

    glibc reads its variable when a process starts. A variable that is set, even to nothing, stays as it is.
    """
    if (
        sys.platform != "linux"
        or {"GLIBC_TUNABLES", "PYTEST_VERSION"} & os.environ.keys()
    ):
        return
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms != "cpu" and (
        platforms or any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    ):
        return
    os.execve(
        sys.executable,
        [sys.executable, *sys.orig_argv[1:]],
        os.environ | {"GLIBC_TUNABLES": MALLOC},
    )


def keep_compiled() -> None:
    """Let JAX keep compiled functions between runs, unless a variable of the environment does or forbids it.

    JAX runs what its cache holds unchecked. A folder that others may open, or another user's, is left alone.
    """
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
    # Every program costs more to compile than to read.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    _mend(folder)


def widen_vectors() -> None:
    """Let XLA compile for vectors of 512 bits, not 256, where the processor has them, unless XLA_FLAGS has a width.

    Older processors with AVX-512, which cannot count the bits of vectors, lower their clock rate for them.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if (
        "PYTEST_VERSION" not in os.environ
        and _WIDTH not in flags
        and "avx512_vpopcntdq" in _features()
    ):
        os.environ["XLA_FLAGS"] = f"{flags} {_WIDTH}=512".strip()


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
