"""Files out: written under a fresh name and renamed, so that they are complete or what they were."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .reading import FileError


class WriteError(OSError):
    """A folder cannot be written to; its files are unchanged."""

    def __init__(self, folder: Path, number: int):
        super().__init__(number, os.strerror(number))
        self.folder = folder

    def __str__(self) -> str:
        assert self.errno is not None
        why, fix = (_OF_WRITING | _OF_READING_TOO)[self.errno]
        return (
            f"{self.folder} cannot be written: {why} ({self.strerror}): {fix}, or give another folder. "
            "Files that were saved before are unchanged"
        )


_NO_LOCKS = (
    "its file system has no locks, which keep two processes apart",
    "mount it with locks",
)
_FORBIDDEN = "that is not permitted", "change its owner or mode"
_GONE = "it is gone", "make or mount it again"
# Cause and remedy of the operating system's errors. Reading does not raise these ...
_OF_WRITING = {
    errno.ENOSPC: ("the disk is full", "free some of it"),
    errno.EDQUOT: ("the quota is used up", "remove files there, or raise the quota"),
    errno.EROFS: ("its file system is read-only", "mount it for writing"),
    errno.EFBIG: ("a file would be larger than allowed", "raise the limit (ulimit -f)"),
    errno.ENOLCK: _NO_LOCKS,
}
# ... but it raises these, perhaps for another folder.
_OF_READING_TOO = {
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOENT: _GONE,
    errno.ENOTDIR: ("a part of its path is a file", "move that file"),
    errno.ESTALE: _GONE,
    errno.EIO: ("its disk fails", "check the disk"),
}


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise faults of the disk, while a block writes into a folder, as a WriteError.

    tensorstore and safetensors raise other errors, whose messages contain the system's code.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        code_in_text = re.search(
            r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error)
        )
        code = getattr(error, "errno", None) or (
            int(code_in_text[1] or code_in_text[2]) if code_in_text else None
        )
        name = getattr(error, "filename", None)
        here = not folder.exists() or (
            name is not None
            and Path(os.fsdecode(name)).absolute().is_relative_to(folder.absolute())
        )
        if code in _OF_WRITING or (code in _OF_READING_TOO and here):
            raise WriteError(folder, code) from error
        raise


def check_no_link(path: Path) -> None:
    """Raise a FileError for a link or a special file where a file is written in place."""
    if os.path.lexists(path) and (
        path.is_symlink() or not (path.is_file() or path.is_dir())
    ):
        raise FileError(
            path,
            got="a link, which could lead out of its folder, or a special file",
            fix="remove it",
        )
    if path.is_file() and path.stat().st_nlink > 1:
        got = "a hard link, so writing to it would change a file elsewhere"
        raise FileError(
            path, got=got, fix="copy it to a new file, and give that its name"
        )


def write(path: Path, writer: Callable[[BinaryIO], Any]) -> None:
    """Let a function write a file under a fresh name, and rename the file once it is complete.

    Raises a FileError for a folder, and a WriteError if the disk is full, read-only or gone; the file is unchanged.
    """
    with _fresh(path) as file:
        writer(file)
        file.flush()
        Path(file.name).replace(path)


def check_writable(path: Path) -> None:
    """Make a file's folder, and raise what `write` would raise there, before anything is computed for the file."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _fresh(path):
        pass


@contextlib.contextmanager
def _fresh(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file next to a path, which is removed at the end of the block unless it was renamed."""
    if path.is_dir():
        raise FileError(path, got="a folder", fix="give a file")
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    with writing(path.parent):
        try:
            with partial.open(
                "xb"
            ) as file:  # not an existing link or pipe, which others may have put there
                yield file
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, that is complete or absent."""
    content = text.encode()
    write(path, lambda file: file.write(content))
