"""States of a run, stored by orbax: arrays may be spread over processes, and each process writes its part.

Only `lorafusion fuse --resume` reads a state. Digests find damage, which orbax loads without an error, but nothing
guards against a forged state. `arrays` is for files that others may read.
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

from ..support import processes
from ..support.reading import T
from ..support.writing import writing
from .arrays import check_signature, signature
from .folders import newest_sound, sealed_folder

_ARRAYS = "arrays"
_STEP = re.compile(r"step_(\d+)")
_METADATA = 1 << 16  # bytes of orbax's own files, about


def save(folder: Path, tree: Any, metadata: Mapping[str, Any]) -> None:
    """Save a tree of arrays and its metadata (any JSON) in a `folders.sealed_folder`.

    With several processes, the arrays are the same in each or spread over all. PRNG keys (save their
    `jax.random.key_data`) and 4-bit types are not supported.
    """
    from orbax.checkpoint import v1 as ocp

    with sealed_folder(folder, metadata, arrays=signature(tree)) as partial:
        if not processes.several():
            tree = jax.tree.map(np.asarray, jax.device_get(tree))
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            # An OSError if the disk is full: when a thread of orbax fails, others wait for it for minutes.
            with tempfile.TemporaryFile(dir=partial) as file:
                os.posix_fallocate(file.fileno(), 0, size + _METADATA)
        with _without_tracebacks():
            ocp.save(str((partial / _ARRAYS).absolute()), tree)


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Drop the tracebacks that orbax's threads log although it raises the error."""

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
    """Return the tree of the last sound folder, as NumPy arrays, and its metadata (see `folders.newest_sound`).

    `abstract` is a tree with the structure, shapes and dtypes that the result must have, or a FileError is raised;
    without it the result is made of dicts and lists.
    """
    sound = newest_sound(folders, metadata, "a complete checkpoint", note=note)
    if sound is None:
        return None
    from orbax.checkpoint import v1 as ocp

    folder, manifest = sound
    if abstract is not None:
        fix = "resume the run that saved it, or restore it from a copy"
        check_signature(
            folder, manifest.get("arrays", {}), signature(abstract), fix=fix
        )
        abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
    return ocp.load(str((folder / _ARRAYS).absolute()), abstract), manifest["metadata"]


def save_step(
    checkpoints: Path, step: int, tree: Any, metadata: Mapping[str, Any], *, keep: int
) -> None:
    """Save `checkpoints / step_000123`, then remove all but the latest `keep` (>= 1)."""
    save(checkpoints / f"step_{step:06d}", tree, metadata)
    if processes.first():
        with writing(checkpoints):
            for old in steps(checkpoints)[:-keep]:
                shutil.rmtree(old)


def steps(checkpoints: Path) -> list[Path]:
    """Return the folders of the saved steps, oldest first."""
    steps = {
        int(match[1]): path
        for path in checkpoints.glob("*")
        if (match := _STEP.fullmatch(path.name))
    }
    return [steps[step] for step in sorted(steps)]
