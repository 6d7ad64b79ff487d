"""Trees of arrays in a file that others may read: safetensors, with a manifest.

FOLDER/manifest.json         metadata, versions, SHA-256 of the file
FOLDER/arrays.safetensors    each array by its path in the tree, such as `magnitudes/SITE`
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..files import FileError, T, shown, some
from . import processes, safetensors
from .folders import RESTORE, Manifest, check_files, newest_sound, read_manifest, sealed_folder

_FILE = "arrays.safetensors"
_DEEPEST = 10  # levels of dicts in dicts


def save(folder: Path, tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Save nested dicts of arrays and their metadata (any JSON) in a `sealed_folder`.

    With several processes, the arrays are the same in each. Names must not have slashes.
    """
    arrays = _flat(tree)
    with sealed_folder(folder, metadata) as partial:
        if processes.first():
            safetensors.save(partial / _FILE, arrays)


def load(folder: Path, *, metadata: type[T] | Any = dict[str, Any], what: str) -> tuple[dict[str, Any], T]:
    """Return the tree of a saved folder, as read-only views of the mapped file, and its metadata as a type.

    Raises a FileError if the folder, of the kind `what`, was not written by `save`, or is damaged.
    """
    manifest, described = read_manifest(folder, metadata, what)
    check_files(folder, manifest["files"])
    return _nested(folder, manifest), described


def load_sound(
    folder: Path, *, metadata: type[T] | Any, what: str, note: Callable[[str], None]
) -> tuple[dict[str, Any], T] | None:
    """Return what `load` does, or None if the folder is missing or damaged (see `folders.newest_sound`)."""
    sound = newest_sound([folder], metadata, what, note=note) if folder.exists() else None
    return sound and (_nested(folder, sound[1]), sound[2])


def signature(tree: Any) -> dict[str, str]:
    """Return dtype and shape of each array by its path in a tree, such as `float32[2, 3]`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def check_signature(folder: Path, found: Mapping[str, str], expected: Mapping[str, str], *, fix: str) -> None:
    """Raise a FileError for the first array of a folder whose signature is not the expected one."""
    for path in {**expected, **found}:
        got, needed = found.get(path, "absent"), expected.get(path, "no such array")
        if got != needed:
            raise FileError(folder, field=some([path]), got=got, expected=needed, fix=fix)


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, np.ndarray]:
    found = {}
    for name, value in tree.items():
        if "/" in name:
            raise ValueError(f"an array is named {name!r}: expected a name without a slash")
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}/")
        else:
            found[f"{above}{name}"] = np.asarray(value)
    return found


def _nested(folder: Path, manifest: Manifest) -> dict[str, Any]:
    if _FILE not in manifest["files"]:
        raise FileError(folder, got=f"the manifest lists no {_FILE}", fix="copy the whole folder again")
    tree: dict[str, Any] = {}
    for path, array in safetensors.load(folder / _FILE).items():
        *above, name = path.split("/")
        place = tree
        for part in above[:_DEEPEST]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                break
        if len(above) > _DEEPEST or not isinstance(place, dict) or name in place:
            raise FileError(folder / _FILE, field=shown(path), got="not the path of an array in a tree", fix=RESTORE)
        place[name] = array
    return tree
