"""Trees of arrays in a file that others may read: safetensors, with a manifest.

FOLDER/manifest.json         metadata, versions, SHA-256 of the file
FOLDER/arrays.safetensors    each array by its path in the tree, such as `magnitudes/SITE`
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ..support import processes
from ..support.reading import FileError, T
from ..support.text import some
from . import safetensors
from .folders import (
    RESTORE,
    Manifest,
    check_files,
    newest_sound,
    read_manifest,
    sealed_folder,
)

_FILE = "arrays.safetensors"
_DEEPEST = 10  # names in the path of an array


def save(folder: Path, tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Save nested dicts of arrays and their metadata (any JSON) in a `sealed_folder`.

    With several processes, the arrays are the same in each. Names must not have slashes.
    """
    arrays = flatten_dict(dict(tree))
    if slashed := [name for path in arrays for name in path if "/" in name]:
        raise ValueError(
            f"an array is named {slashed[0]!r}: expected a name without a slash"
        )
    with sealed_folder(folder, metadata) as partial:
        if processes.first():
            safetensors.save(
                partial / _FILE,
                {"/".join(path): np.asarray(array) for path, array in arrays.items()},
            )


def load(
    folder: Path, *, metadata: type[T] | Any = dict[str, Any], what: str
) -> tuple[dict[str, Any], T]:
    """Return the tree of a saved folder, as read-only views of the mapped file, and its metadata as a type.

    Raises a FileError if the folder, of the kind `what`, was not written by `save`, or is damaged.
    """
    manifest = read_manifest(folder, metadata, what)
    check_files(folder, manifest["files"])
    return _nested(folder, manifest), manifest["metadata"]


def load_sound(
    folder: Path, *, metadata: type[T] | Any, what: str, note: Callable[[str], None]
) -> tuple[dict[str, Any], T] | None:
    """Return what `load` does, or None if the folder is missing or damaged (see `folders.newest_sound`)."""
    sound = (
        newest_sound([folder], metadata, what, note=note) if folder.exists() else None
    )
    return sound and (_nested(folder, sound[1]), sound[1]["metadata"])


def signature(tree: Any) -> dict[str, str]:
    """Return dtype and shape of each array by its path in a tree, such as `float32[2, 3]`."""
    return {
        jax.tree_util.keystr(
            path, simple=True, separator="/"
        ): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def check_signature(
    folder: Path, present: Mapping[str, str], expected: Mapping[str, str], *, fix: str
) -> None:
    """Raise a FileError for the first array of a folder whose signature is not the expected one."""
    for path in {**expected, **present}:
        got = present.get(path, "absent")
        needed = expected.get(path, "no such array")
        if got != needed:
            raise FileError(
                folder, field=some([path]), got=got, expected=needed, fix=fix
            )


def _nested(folder: Path, manifest: Manifest) -> dict[str, Any]:
    if _FILE not in manifest["files"]:
        raise FileError(
            folder,
            got=f"the manifest lists no {_FILE}",
            fix="copy the whole folder again",
        )
    arrays = {
        tuple(path.split("/")): array
        for path, array in safetensors.load(folder / _FILE).items()
    }
    for path in arrays:
        if len(path) > _DEEPEST or any(
            path[:above] in arrays for above in range(1, len(path))
        ):
            field = repr("/".join(path))
            raise FileError(
                folder / _FILE,
                field=field,
                got="not the path of an array in a tree",
                fix=RESTORE,
            )
    return unflatten_dict(arrays)
