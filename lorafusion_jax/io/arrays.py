"""Trees of arrays that others may read, such as the trained numbers of a run: a safetensors file and a manifest.

    FOLDER/manifest.json         metadata, versions, SHA-256 of the file
    FOLDER/arrays.safetensors    each array by its path in the tree, such as `magnitudes/SITE`

Damage is found by the digest, and a file from a stranger can hold no more than its own size.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import FileError, T, shown
from . import processes, safetensors
from .folders import RESTORE, Manifest, check_files, newest_sound, read_manifest, sealed_folder

_FILE = "arrays.safetensors"
_DEEPEST = 10  # levels of dicts in dicts


def save(folder: Path, tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Save nested dicts of arrays with metadata; the folder gets its name only when everything is on the disk.

    Args:
      folder: the folder to make.
      tree: its names are texts without a slash; with several processes, the same in each.
      metadata: anything that JSON can hold.

    Raises:
      ValueError: the folder exists, or a name has a slash.
      WriteError: the disk is full, read-only or gone.
    """
    arrays = _flat(tree)
    with sealed_folder(folder, metadata) as partial:
        if processes.first():
            safetensors.save(partial / _FILE, arrays)


def load(folder: Path, *, metadata: type[T] | Any = dict[str, Any], what: str) -> tuple[dict[str, Any], T]:
    """Return the tree of a saved folder, as read-only views of the mapped file, and its metadata.

    Args:
      folder: the folder.
      metadata: the type of the metadata.
      what: kind of the folder, for messages.

    Raises:
      FileError: the folder is none that `save` wrote, or is damaged.
    """
    manifest, described = read_manifest(folder, metadata, what)
    check_files(folder, manifest["files"])
    return _nested(folder, manifest), described


def load_sound(
    folder: Path, *, metadata: type[T] | Any, what: str, note: Callable[[str], None]
) -> tuple[dict[str, Any], T] | None:
    """Return what `load` does, or None if the folder is missing or damaged (see `folders.newest_sound`)."""
    sound = newest_sound([folder], metadata, what, note=note) if folder.exists() else None
    return sound and (_nested(folder, sound.manifest), sound.metadata)


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
