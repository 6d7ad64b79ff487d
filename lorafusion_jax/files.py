"""Files that are complete or absent: written under a temporary name, then renamed; and Git LFS pointers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let a function write a file under a temporary name, and rename the file once it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    writer(partial)
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, that is complete or absent."""
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is complete or absent."""
    write(path, lambda partial: partial.write_bytes(content))


def is_lfs_pointer(path: Path) -> bool:
    """Return whether the file is a Git LFS pointer instead of the content."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER
