"""Files and folders out: written under a temporary name and renamed, so that they are complete or what they were."""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .reading import FileError, is_object


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


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, which is renamed to `folder` once the block has ended without an error.

    The remains of an earlier attempt that was killed are removed.

    Raises:
      ValueError: the folder exists, or another process is writing it.
      WriteError: the disk is full, read-only or gone.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists: give a new folder, or remove it first")
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder.parent), _claimed(partial):
        yield partial
        partial.rename(folder)


@contextlib.contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """Hold an empty folder, which is removed after an error; the lock ends with the process."""
    if partial.is_symlink():  # its target must not be emptied
        partial.unlink()
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = os.path.samestat(os.fstat(lock), partial.stat())
    except (BlockingIOError, FileNotFoundError):
        alone = False
    try:
        if not alone:  # another process writes it, or has just renamed it
            raise ValueError(
                f"{partial} is being written by another process: wait for it, or give another folder"
            )
        try:
            for path in partial.iterdir():
                _remove(path)
            yield
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def locked(folder: Path, option: str) -> Iterator[None]:
    """Make a folder, keep other processes out of it, and remove files that a killed process left unfinished there.

    Raises a ValueError if another process holds the lock, or if it is a link; `option` gives another folder.
    """
    with contextlib.ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            check_no_link(folder / ".lock")
            lock = stack.enter_context(open(folder / ".lock", "a+"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise ValueError(
                    f"{folder} is in use by process {lock.read().strip() or 'unknown'}: wait for it, or give {option}"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            remove_partial(folder)
        yield


def remove_partial(folder: Path) -> None:
    """Remove the incomplete files that a killed process left in a folder; the caller keeps other processes out."""
    for partial in folder.glob(".*.partial"):
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with one entry a line, but lists of numbers on one line."""
    # A JSON string never holds a line break, so the pattern cannot match inside one.
    numbers = re.compile(r"\[\n\s*([-+.\deE][-+.\deE,\s]*?)\s*\]")
    text = numbers.sub(
        lambda match: f"[{' '.join(match[1].split())}]", json.dumps(content, indent=1)
    )
    write_text(path, f"{text}\n")


def append_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add objects to a file of JSON lines, which is made if it does not exist, and return when they are on disk.

    They replace a last line that was cut off. Processes that append at the same time wait for each other.

    Raises:
      ValueError: the file is a link.
      WriteError: the disk is full, read-only or gone, or has no locks.
    """
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        check_no_link(file)
        with open(file, "a+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            opened.seek(0)
            last = opened.read().rpartition(b"\n")[
                2
            ]  # empty if the last line has its end
            if is_object(last):
                lines = [b"\n", *lines]
            elif last:
                opened.truncate(os.fstat(opened.fileno()).st_size - len(last))
            opened.write(b"".join(lines))
            opened.flush()
            os.fsync(opened.fileno())
