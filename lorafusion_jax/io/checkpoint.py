"""Trees of arrays on disk, by orbax, with a SHA-256 of every file. A folder is complete or absent.

Several processes (see `processes`) save together. Each writes its own part of the arrays to a shared file system.

The digests are needed because orbax loads a data file with a flipped byte without an error. Leaves come back as
NumPy arrays, so a checkpoint does not depend on the devices that wrote it; the caller places them.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np

from .. import __version__, interrupts
from ..files import FileError, T, read_json, shown, structured, write_text, writing
from . import processes
from .ocdbt import most_decoded
from .source import inside, sha256

_ARRAYS = "arrays"
_MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d+)")
_RESTORE = "restore it from a copy"
_METADATA = 1 << 16  # bytes of orbax's own files, about
# Numbers for each byte of their files, in which zeros take no place; small arrays may have more.
_MOST_ZEROS, _SMALL = 1_000, 1 << 24
# Bytes of keys for each byte of their files; those of 6,000 arrays have 76. Few keys may have more.
_MOST_KEYS, _FEW_KEYS = 200, 1 << 26


class Record(TypedDict):
    """What the files of a tree of arrays hold: "float32[2, 3]" by the path in the tree, SHA-256 by the path on disk."""

    arrays: dict[str, str]
    files: dict[str, str]


class _Saved(Record):
    metadata: dict[str, Any]
    versions: NotRequired[dict[str, str]]


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, which is renamed to `folder` once the block has ended without an error.

    With several processes, the first one makes and renames it. The remains of an earlier attempt that was killed
    are removed.

    Raises:
      ValueError: the folder exists, or another process is writing it.
      WriteError: the disk is full, read-only or gone.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists: give a new folder, or remove it first")
    with writing(folder.parent):
        yield from _new_folder(folder)


def _new_folder(folder: Path) -> Iterator[Path]:
    partial = folder.with_name(f".{folder.name}.partial")
    lock = _claimed(partial) if processes.first() else None
    processes.barrier(f"{folder.name} is there")
    try:
        with interrupts.removed(partial) if lock is not None else contextlib.nullcontext():
            yield partial
            if lock is not None:
                partial.rename(folder)
        processes.barrier(f"{folder.name} is whole")
    except BaseException:
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _claimed(partial: Path) -> int:
    """Empty a folder, or make it, and return its locked descriptor: a process that is killed leaves no lock."""
    if partial.is_symlink():  # what it leads to is not ours to empty
        partial.unlink()
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = os.path.samestat(os.fstat(lock), partial.stat())
    except (BlockingIOError, FileNotFoundError):
        alone = False
    if not alone:  # another process writes it, or has just renamed it
        os.close(lock)
        raise ValueError(f"{partial} is being written by another process: wait for it, or give another folder")
    for path in partial.iterdir():
        _remove(path)
    return lock


def write_arrays(folder: Path, tree: Any) -> Record:
    """Write a tree to `folder / "arrays"` and return the record that `read_arrays` checks it against.

    Args:
      folder: an existing folder.
      tree: arrays of any device or NumPy; with several processes, the same in each or spread over all. PRNG keys
        (save their `jax.random.key_data`) and 4-bit types are not supported.
    """
    from orbax.checkpoint import v1 as ocp

    if not processes.several():
        tree = jax.tree.map(np.asarray, jax.device_get(tree))
        _check_room(folder, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
    with _without_tracebacks():
        ocp.save(str((folder / _ARRAYS).absolute()), tree)
    files = sorted(path for path in (folder / _ARRAYS).rglob("*") if path.is_file())
    return {
        "arrays": _signature(tree),
        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
    }


def _check_room(folder: Path, size: int) -> None:
    """Raise an OSError if so many bytes do not fit: where a thread of orbax fails, others wait for it for minutes."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size + _METADATA)


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Leave out the tracebacks that orbax's threads log of an error which it raises anyway."""

    def other(record: logging.LogRecord) -> bool:
        return "_SignalingThread" not in record.getMessage()

    log = logging.getLogger("absl")
    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def read_arrays(folder: Path, record: Record, abstract: Any = None) -> Any:
    """Read the tree that `write_arrays` wrote, as NumPy arrays.

    Args:
      folder: the folder that it was written to.
      record: the record that `write_arrays` returned.
      abstract: a tree with the structure, shapes and dtypes that the result must have. Without it the result
        consists of nested dicts and lists.

    Raises:
      ValueError: a file is missing or damaged, or the arrays are not those of `abstract`, or far larger than the files.
    """
    _check_files(folder, record["files"])
    return _read_checked(folder, record, abstract)


def _read_checked(folder: Path, record: Record, abstract: Any) -> Any:
    """Read a tree whose files have been compared with their digests."""
    from orbax.checkpoint import v1 as ocp

    check_size(folder, record)
    if abstract is not None:
        _compare(folder, _signature(abstract), record["arrays"], fix="it was saved by a run of another configuration")
        abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
    with _readable(folder / _ARRAYS):
        _check_store(folder, record)
        tree = ocp.load(str((folder / _ARRAYS).absolute()), abstract)
    _compare(folder, record["arrays"], _signature(tree), fix=_RESTORE)
    return tree


def _check_store(folder: Path, record: Record) -> None:
    """Raise a FileError if a store has far larger keys or arrays than its files: orbax goes by it, not by the record.

    Reading the shapes by `ocp.metadata` would take as long as reading the arrays.
    """
    import tensorstore

    stored = sum(inside(folder, name).stat().st_size for name in record["files"])
    keys = sum(most_decoded(inside(folder, name)) for name in record["files"])
    if keys > max(_MOST_KEYS * stored, _FEW_KEYS):
        got = f"keys of up to {keys:,} bytes in files of {stored:,} bytes"
        raise FileError(folder, got=got, wanted=f"at most {_MOST_KEYS} for each byte", fix=_RESTORE)
    size = 0
    for path in (folder / _ARRAYS).rglob("manifest.ocdbt"):
        if path.parent.name.startswith("ocdbt.process_"):  # parts of the store that it is in
            continue
        base = f"file://{path.parent.absolute()}/"
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        for key in store.list().result():
            if key.endswith(b"/zarr.json"):
                array = json.loads(store.read(key).result().value)
                size += max(map(math.prod, (array["shape"], array["chunk_grid"]["configuration"]["chunk_shape"])))
    _check_numbers(folder, record, size)


@contextlib.contextmanager
def _readable(arrays: Path) -> Iterator[None]:
    """Turn what orbax raises and logs of files that it cannot read into a FileError."""

    def none(record: logging.LogRecord) -> bool:
        return False

    log = logging.getLogger("absl")
    log.addFilter(none)
    try:
        yield
    except (FileError, MemoryError):
        raise
    except Exception as error:  # of many kinds, as the files are JSON and tensorstore's
        # Files that orbax's own metadata names may be missing; other errors are the file system's.
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise
        reason = f"{type(error).__name__}: {shown(str(error))}"
        raise FileError(arrays, got=f"orbax cannot read it ({reason})", fix=_RESTORE) from error
    finally:
        log.removeFilter(none)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with one entry a line, but lists of numbers on one line."""
    # A JSON string never holds a line break, so the pattern cannot match inside one.
    numbers = re.compile(r"\[\n\s*([-+.\deE][-+.\deE,\s]*?)\s*\]")
    text = numbers.sub(lambda match: f"[{' '.join(match[1].split())}]", json.dumps(content, indent=1))
    write_text(path, f"{text}\n")


def check_size(folder: Path, record: Record) -> None:
    """Raise a FileError if arrays take far more memory than their files, before anything is allocated."""
    shapes = (map(int, re.findall(r"\d+", text.partition("[")[2])) for text in record["arrays"].values())
    _check_numbers(folder, record, sum(map(math.prod, shapes)))


def _check_numbers(folder: Path, record: Record, size: int) -> None:
    stored = sum(inside(folder, name).stat().st_size for name in record["files"])
    if size > max(_MOST_ZEROS * stored, _SMALL):
        got = f"arrays of {size:,} numbers in files of {stored:,} bytes"
        raise FileError(folder, got=got, wanted=f"at most {_MOST_ZEROS:,} for each byte", fix=_RESTORE)


def save(folder: Path, tree: Any, metadata: Mapping[str, Any]) -> None:
    """Save a tree of arrays with its metadata; the folder gets its name only when everything is on the disk.

    Args:
      folder: the folder to make.
      tree: as in `write_arrays`.
      metadata: anything that JSON can hold.

    Raises:
      ValueError: the folder exists.
      WriteError: the disk is full, read-only or gone.
    """
    with new_folder(folder) as partial:
        record = write_arrays(partial, tree)
        if processes.first():
            versions = {"lorafusion-jax": __version__}
            write_json(partial / _MANIFEST, {"metadata": metadata, "versions": versions, **record})
            for path in partial.rglob("*"):
                _flush(path)
    with writing(folder.parent):
        _flush(folder.parent)


def load(folder: Path, abstract: Any = None, *, metadata: type[T] | Any = dict[str, Any]) -> tuple[Any, T]:
    """Return the tree, as `read_arrays` does, and the metadata of a saved folder as an object of a type.

    Raises:
      ValueError: the folder is not a checkpoint, a file is missing or damaged, or the arrays are not those of
        `abstract`.
    """
    manifest, described = read_metadata(folder, metadata)
    return read_arrays(folder, manifest, abstract), described


def read_metadata(folder: Path, metadata: type[T] | Any, what: str = "a complete checkpoint") -> tuple[Record, T]:
    """Return the record of a saved folder's arrays, and its metadata as an object of a type.

    Raises:
      FileError: the folder has no manifest, or another one.
    """
    manifest = read_json(folder / _MANIFEST, _Saved, what)
    return manifest, structured(manifest["metadata"], metadata, folder / _MANIFEST, whole=manifest)


def save_step(checkpoints: Path, step: int, tree: Any, metadata: Mapping[str, Any], *, keep: int) -> None:
    """Save `checkpoints / step_000123`, then remove all but the latest `keep` (>= 1)."""
    save(checkpoints / f"step_{step:06d}", tree, metadata)
    if processes.first():
        with writing(checkpoints):
            for old in steps(checkpoints)[:-keep]:
                shutil.rmtree(old)


def load_newest(
    folders: Sequence[Path],
    abstract: Any = None,
    *,
    metadata: type[T] | Any = dict[str, Any],
    note: Callable[[str], None],
) -> tuple[Any, T] | None:
    """Return what `load` does of the last folder that is sound, or None if none is.

    Damaged folders behind it are renamed to NAME.damaged, NAME.damaged-2 and so on, so that their steps can be saved
    again. One whose manifest another version wrote is not damaged, although this version cannot read it.

    Args:
      folders: saved folders, oldest first.
      abstract: as in `load`.
      metadata: as in `load`.
      note: is told of every damaged folder, in one line.

    Raises:
      FileError: the arrays of a sound folder are not those of `abstract`, or another version wrote what is newest.
    """
    damaged: list[tuple[Path, Path, FileError]] = []
    sound = None
    for folder in reversed(folders):
        try:
            record, described = read_metadata(folder, metadata)
            _check_files(folder, record["files"])
        except FileError as error:
            if error.version:
                raise
            damaged.append((folder, _aside(folder), error))
        else:
            sound = folder, record, described
            break
    processes.barrier("every process has looked for damage")
    for folder, aside, error in damaged:
        note(f"note: {error}. It is kept as {aside.name}")
        if processes.first():
            folder.rename(aside)
    if sound is None:
        return None
    folder, record, described = sound
    return _read_checked(folder, record, abstract), described


def _aside(folder: Path) -> Path:
    """Return a free name for a damaged folder."""
    names = (f"{folder.name}.damaged{f'-{number}' if number > 1 else ''}" for number in itertools.count(1))
    return next(path for path in map(folder.with_name, names) if not os.path.lexists(path))


def remove_partial(folder: Path) -> None:
    """Remove from a folder what a process that was killed had not written whole; the caller keeps others out."""
    for partial in folder.glob(".*.partial"):
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def steps(checkpoints: Path) -> list[Path]:
    """Return the folders of the steps that are there, oldest first."""
    steps = {int(match[1]): path for path in checkpoints.glob("*") if (match := _STEP.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def _check_files(root: Path, files: Mapping[str, str]) -> None:
    """Raise a ValueError that names the first file that is missing, is not listed, or has another SHA-256."""
    for path in (root / _ARRAYS).rglob("*"):
        if path.is_symlink() and path.is_dir():  # what lies in it would not be compared
            raise FileError(path, got="a link to a folder", fix="copy the whole folder again")
        if not path.is_dir() and path.relative_to(root).as_posix() not in files:
            raise FileError(path, got="the manifest does not list this file", fix="copy the whole folder again")
    for name, digest in files.items():
        path = inside(root, name)
        if not path.is_file():
            raise FileError(path, got="no such file, though the manifest lists it", fix="copy the whole folder again")
        if sha256(path) != digest:
            raise FileError(path, got="damaged or altered, its SHA-256 is not the manifest's", fix=_RESTORE)


def _compare(folder: Path, wanted: Mapping[str, str], got: Mapping[str, str], *, fix: str) -> None:
    for path in {**wanted, **got}:
        if wanted.get(path) != got.get(path):
            found, needed = got.get(path, "absent"), wanted.get(path, "no such array")
            raise FileError(folder, field=path, got=found, wanted=needed, fix=fix)


def _signature(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
