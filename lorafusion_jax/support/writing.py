"""Files out: written under a fresh name and renamed, so that they are complete or what they were."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .reading import FileError


class WriteError(OSError):
    """A folder cannot be written to; its files are unchanged."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise an OSError of a block that writes into a folder as a WriteError, unless it is about another file."""
    try:
        yield
    except (WriteError, BrokenPipeError):
        raise
    except OSError as error:
        name = error.filename
        if name is not None:
            path = Path(os.fsdecode(name)).absolute()
            if folder.exists() and not path.is_relative_to(folder.absolute()):
                raise
        raise WriteError(
            f"{folder} cannot be written ({error}): free some of its disk, allow writing, or give another folder. "
            "Files that were saved before are unchanged"
        ) from error


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
