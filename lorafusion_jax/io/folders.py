"""Folders are written under a temporary name and renamed once complete."""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..support.writing import check_no_link, write_text, writing


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
