"""States of a run, by orbax: arrays that may be spread over processes, each of which writes its own part.

Only `lorafusion fuse --resume` reads a state. A state is private to its run: digests find damage, which orbax loads
without an error, but nothing here guards against a state that was forged. What others may read is in `arrays`.
"""

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..files import FileError, T, writing
from . import processes
from .folders import Manifest, newest_sound, sealed_folder

_ARRAYS = "arrays"
_STEP = re.compile(r"step_(\d+)")
_METADATA = 1 << 16  # bytes of orbax's own files, about


def save(folder: Path, tree: Any, metadata: Mapping[str, Any]) -> None:
    """Save a tree of arrays with its metadata; the folder gets its name only when everything is on the disk.

    Args:
      folder: the folder to make.
      tree: arrays of any device or NumPy; with several processes, the same in each or spread over all. PRNG keys
        (save their `jax.random.key_data`) and 4-bit types are not supported.
      metadata: anything that JSON can hold.

    Raises:
      ValueError: the folder exists.
      WriteError: the disk is full, read-only or gone.
    """
    from orbax.checkpoint import v1 as ocp

    with sealed_folder(folder, metadata, arrays=_signature(tree)) as partial:
        if not processes.several():
            tree = jax.tree.map(np.asarray, jax.device_get(tree))
            _check_room(partial, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        with _without_tracebacks():
            ocp.save(str((partial / _ARRAYS).absolute()), tree)


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


def load_newest(
    folders: Sequence[Path],
    abstract: Any = None,
    *,
    metadata: type[T] | Any = dict[str, Any],
    note: Callable[[str], None],
) -> tuple[Any, T] | None:
    """Return the tree of the last folder that is sound, as NumPy arrays, and its metadata, or None if none is.

    Damaged folders are renamed (see `folders.newest_sound`).

    Args:
      folders: saved folders, oldest first.
      abstract: a tree with the structure, shapes and dtypes that the result must have. Without it the result
        consists of nested dicts and lists.
      metadata: the type of the metadata.
      note: called with one line for each damaged folder.

    Raises:
      FileError: the arrays of a sound folder are not those of `abstract`, or another version wrote what is newest.
    """
    sound = newest_sound(folders, metadata, "a complete checkpoint", note=note)
    return sound and (_read(sound.folder, sound.manifest, abstract), sound.metadata)


def _read(folder: Path, manifest: Manifest, abstract: Any) -> Any:
    """Read a tree whose files have been compared with their digests."""
    from orbax.checkpoint import v1 as ocp

    if abstract is not None:
        expected, got = _signature(abstract), manifest.get("arrays", {})
        for path in {**expected, **got}:
            if expected.get(path) != got.get(path):
                found, needed = got.get(path, "absent"), expected.get(path, "no such array")
                fix = "it was saved by a run of another configuration"
                raise FileError(folder, field=path, got=found, expected=needed, fix=fix)
        abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
    return ocp.load(str((folder / _ARRAYS).absolute()), abstract)


def _signature(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def save_step(checkpoints: Path, step: int, tree: Any, metadata: Mapping[str, Any], *, keep: int) -> None:
    """Save `checkpoints / step_000123`, then remove all but the latest `keep` (>= 1)."""
    save(checkpoints / f"step_{step:06d}", tree, metadata)
    if processes.first():
        with writing(checkpoints):
            for old in steps(checkpoints)[:-keep]:
                shutil.rmtree(old)


def steps(checkpoints: Path) -> list[Path]:
    """Return the folders of the steps that are there, oldest first."""
    steps = {int(match[1]): path for path in checkpoints.glob("*") if (match := _STEP.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]
