"""Trees of arrays on disk, by orbax, with a SHA-256 of every file. A folder is complete or absent.

Several processes (see `processes`) save together. Each writes its own part of the arrays to a shared file system.

The digests are needed because orbax loads a data file with a flipped byte without an error. Leaves come back as
NumPy arrays, so a checkpoint does not depend on the devices that wrote it; the caller places them.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..files import write_text
from . import processes
from .source import inside, sha256

_ARRAYS = "arrays"
_MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d+)")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, which is renamed to `folder` once the block has ended without an error.

    With several processes, the first one makes and renames it. The remains of an earlier attempt that was killed
    are removed.

    Raises:
      ValueError: the folder exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists: give a new folder, or remove it first")
    partial = folder.with_name(f".{folder.name}.partial")
    if processes.first():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.barrier(f"{folder.name} is there")
    try:
        yield partial
        if processes.first():
            partial.rename(folder)
        processes.barrier(f"{folder.name} is whole")
    finally:
        if processes.first():
            shutil.rmtree(partial, ignore_errors=True)


def write_arrays(folder: Path, tree: Any) -> dict[str, Any]:
    """Write a tree to `folder / "arrays"` and return the record that `read_arrays` checks it against.

    Args:
      folder: an existing folder.
      tree: arrays of any device or NumPy; with several processes, the same in each or spread over all. PRNG keys
        (save their `jax.random.key_data`) and 4-bit types are not supported.

    Returns:
      `arrays`: "float32[2, 3]" by the path in the tree; `files`: SHA-256 by the path below `folder`.
    """
    from orbax.checkpoint import v1 as ocp

    if not processes.several():
        tree = jax.tree.map(np.asarray, jax.device_get(tree))
    ocp.save(str((folder / _ARRAYS).absolute()), tree)
    files = sorted(path for path in (folder / _ARRAYS).rglob("*") if path.is_file())
    return {
        "arrays": _signature(tree),
        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
    }


def read_arrays(folder: Path, record: Mapping[str, Any], abstract: Any = None) -> Any:
    """Read the tree that `write_arrays` wrote, as NumPy arrays.

    Args:
      folder: the folder that it was written to.
      record: the record that `write_arrays` returned.
      abstract: a tree with the structure, shapes and dtypes that the result must have. Without it the result
        consists of nested dicts and lists.

    Raises:
      ValueError: a file is missing or damaged, or the arrays are not those of `abstract`.
    """
    from orbax.checkpoint import v1 as ocp

    _check_files(folder, record["files"])
    if abstract is None:
        return ocp.load(str((folder / _ARRAYS).absolute()))
    wanted, got = _signature(abstract), record["arrays"]
    for path in wanted | got:
        if wanted.get(path) != got.get(path):
            raise ValueError(
                f"{folder}: {path} is {got.get(path, 'absent')}: wanted {wanted.get(path, 'no such array')}; "
                "it was saved by a run of another configuration"
            )
    return ocp.load(
        str((folder / _ARRAYS).absolute()), jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with one entry a line, but lists of numbers on one line."""
    # A JSON string never holds a line break, so the pattern cannot match inside one.
    numbers = re.compile(r"\[\n\s*([-+.\deE,\s]+?)\s*\]")
    text = numbers.sub(lambda match: f"[{' '.join(match[1].split())}]", json.dumps(content, indent=1))
    write_text(path, f"{text}\n")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      ValueError: the file is missing or is not a JSON object; `what` names the kind of folder in the message.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} is not {what}: it has no {path.name}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}): restore it from a copy") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object: restore it from a copy")
    return content


def save(folder: Path, tree: Any, metadata: Mapping[str, Any]) -> None:
    """Save a tree of arrays with its metadata; the folder gets its name only when everything is on the disk.

    Args:
      folder: the folder to make.
      tree: as in `write_arrays`.
      metadata: anything that JSON can hold.

    Raises:
      ValueError: the folder exists.
    """
    with new_folder(folder) as partial:
        record = write_arrays(partial, tree)
        if processes.first():
            write_json(partial / _MANIFEST, {"metadata": metadata, **record})
            for path in partial.rglob("*"):
                _flush(path)
    _flush(folder.parent)


def load(folder: Path, abstract: Any = None) -> tuple[Any, dict[str, Any]]:
    """Return the tree, as `read_arrays` does, and the metadata of a saved folder.

    Raises:
      ValueError: the folder is not a checkpoint, a file is missing or damaged, or the arrays are not those of
        `abstract`.
    """
    manifest = read_json(folder / _MANIFEST, "a complete checkpoint")
    return read_arrays(folder, manifest, abstract), manifest["metadata"]


def save_step(checkpoints: Path, step: int, tree: Any, metadata: Mapping[str, Any], *, keep: int) -> None:
    """Save `checkpoints / step_000123`, then remove all but the latest `keep` (>= 1)."""
    save(checkpoints / f"step_{step:06d}", tree, metadata)
    if processes.first():
        for old in _steps(checkpoints)[:-keep]:
            shutil.rmtree(old)


def latest(checkpoints: Path) -> Path | None:
    """Return the folder of the latest step, or None without any."""
    return next(reversed(_steps(checkpoints)), None)


def _steps(checkpoints: Path) -> list[Path]:
    steps = {int(match[1]): path for path in checkpoints.glob("*") if (match := _STEP.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def _check_files(root: Path, files: Mapping[str, str]) -> None:
    """Raise a ValueError that names the first file that is missing, is not listed, or has another SHA-256."""
    for path in (root / _ARRAYS).rglob("*"):
        if path.is_file() and path.relative_to(root).as_posix() not in files:
            raise ValueError(f"{path}: the manifest does not list this file: copy the whole folder again")
    for name, digest in files.items():
        path = inside(root, name)
        if not path.is_file():
            raise ValueError(f"{path}: no such file, though the manifest lists it: copy the whole folder again")
        if sha256(path) != digest:
            raise ValueError(f"{path}: damaged or altered, its SHA-256 is not the manifest's: restore it from a copy")


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
