"""States of a run, saved after a step; only `lorafusion fuse --resume` reads them."""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from ..support.reading import T
from ..support.writing import writing
from . import store

_KIND = "checkpoint"
_STEP = re.compile(r"step_(\d+)")


def load_newest(
    folders: Sequence[Path],
    state: Any,
    *,
    metadata: type[T] | Any = dict[str, Any],
    note: Callable[[str], None],
) -> tuple[Any, T] | None:
    """Return the tree of the last sound folder, as NumPy arrays, and its metadata (see `store.newest_sound`).

    `state` is a tree with the structure, shapes and dtypes that the result must have, or a FileError is raised.
    """
    sound = store.newest_sound(folders, _KIND, metadata, note=note)
    if sound is None:
        return None
    folder, manifest = sound
    arrays = flatten_dict(store.read_tree(folder), sep="/")
    store.check_signature(
        folder,
        store.signature(arrays),
        store.signature(state),
        fix="resume the run that saved it, or restore it from a copy",
    )
    leaves = [arrays[path] for path in store.signature(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves), manifest["metadata"]


def save_step(
    checkpoints: Path, step: int, state: Any, metadata: Mapping[str, Any], *, keep: int
) -> None:
    """Save `checkpoints / step_000123`, then remove all but the latest `keep` (>= 1).

    `state` is a tree of arrays, without PRNG keys (save their `jax.random.key_data`) and types of 4 bits.
    """
    arrays = dict(zip(store.signature(state), jax.tree.leaves(state), strict=True))
    store.save(checkpoints / f"step_{step:06d}", _KIND, arrays, metadata)
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
