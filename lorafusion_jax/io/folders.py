"""Folders are written under a temporary name and renamed once complete; a manifest has the SHA-256 of each file.

Several processes (see `processes`) call these functions together. The first one makes, renames and removes folders.
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NotRequired, TypedDict

from ..support import processes
from ..support.reading import FileError, T, read_json
from ..support.version import __version__
from ..support.writing import check_no_link, write_text, writing
from .source import inside, sha256

MANIFEST = "manifest.json"
RESTORE = "restore it from a copy"


class Manifest(TypedDict, Generic[T]):
    """Content of `manifest.json`: the writer's metadata, and the SHA-256 of each file by its path."""

    metadata: T
    files: dict[str, str]
    versions: NotRequired[dict[str, str]]
    arrays: NotRequired[
        dict[str, str]
    ]  # of a state: "float32[2, 3]" by the path in the tree


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
    with (
        writing(folder.parent),
        _claimed(partial) if processes.first() else contextlib.nullcontext(),
    ):
        processes.barrier(f"{folder.name} is there")
        yield partial
        if processes.first():
            partial.rename(folder)
        processes.barrier(f"{folder.name} is whole")


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


@contextlib.contextmanager
def sealed_folder(
    folder: Path, metadata: Mapping[str, Any], **fields: Any
) -> Iterator[Path]:
    """Yield a `new_folder` that gets a manifest and its name once all files are on the disk.

    `metadata` is any JSON, and `fields` are other fields of the manifest.
    """
    with new_folder(folder) as partial:
        yield partial
        if processes.first():
            names = sorted(
                path.relative_to(partial).as_posix()
                for path in partial.rglob("*")
                if path.is_file()
            )
            files = {name: sha256(partial / name) for name in names}
            versions = {"lorafusion-jax": __version__}
            write_json(
                partial / MANIFEST,
                {"metadata": metadata, "versions": versions, **fields, "files": files},
            )
            for path in partial.rglob("*"):
                _flush(path)
    with writing(folder.parent):
        _flush(folder.parent)


def read_manifest(folder: Path, metadata: type[T] | Any, what: str) -> Manifest[T]:
    """Return the manifest that `sealed_folder` wrote, with metadata of the type `metadata`.

    Raises a FileError if the folder, of the kind `what`, has no manifest, or another one.
    """
    generic: Any = Manifest
    return read_json(folder / MANIFEST, generic[metadata], what)


def check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Raise a FileError for the first file that is missing or has another SHA-256 than given."""
    for name, digest in files.items():
        path = inside(folder, name)
        if not path.is_file():
            raise FileError(
                path,
                got="no such file, though the manifest lists it",
                fix="copy the whole folder again",
            )
        if sha256(path) != digest:
            raise FileError(
                path,
                got="damaged or altered, its SHA-256 is not the manifest's",
                fix=RESTORE,
            )


def newest_sound(
    folders: Sequence[Path],
    metadata: type[T] | Any,
    what: str,
    *,
    note: Callable[[str], None],
) -> tuple[Path, Manifest[T]] | None:
    """Return the last of some `sealed_folder`s (oldest first) that is sound, or None if none is.

    Damaged folders behind it are renamed to NAME.damaged, NAME.damaged-2 and so on, so that they can be written again,
    and `note` is called with a line for each. The other arguments are those of `read_manifest`.

    Raises:
      FileError: this version cannot read the newest folder, because another one wrote it.
    """
    damaged: list[tuple[Path, Path, FileError]] = []
    sound = None
    for folder in reversed(folders):
        try:
            manifest = read_manifest(folder, metadata, what)
            check_files(folder, manifest["files"])
        except FileError as error:
            if error.version:
                raise
            names = (
                f"{folder.name}.damaged{f'-{number}' if number > 1 else ''}"
                for number in itertools.count(1)
            )
            aside = next(
                path
                for path in map(folder.with_name, names)
                if not os.path.lexists(path)
            )
            damaged.append((folder, aside, error))
        else:
            sound = folder, manifest
            break
    processes.barrier("every process has looked for damage")
    for folder, aside, error in damaged:
        note(f"note: {error}. It is kept as {aside.name}")
        if processes.first():
            folder.rename(aside)
    return sound


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
