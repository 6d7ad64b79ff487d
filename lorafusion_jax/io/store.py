"""The one store of arrays: a folder with a manifest, which is complete or absent.

    FOLDER/manifest.json         kind, metadata, versions, SHA-256 of each file
    FOLDER/arrays.safetensors    each array by its path in a tree, such as `magnitudes/SITE`

`save` writes nested dicts of arrays with metadata (any JSON), and `load` returns both:

    store.save(folder, "correction", {"q": {"scale": scale}}, {"chip": 0})
    tree, metadata = store.load(folder, "correction", Description)

`Description` is the type of the metadata, a TypedDict or a dataclass. A folder of another kind is refused, and one of
an earlier format too, with the version that wrote it. Other files, such as the adapters of a pool, get a manifest by
`seal`. Of several processes, the first one saves.
"""

import itertools
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypedDict

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ..support import processes
from ..support.reading import FileError, T, decode_as, other_version, read_json
from ..support.text import some
from ..support.version import __version__
from ..support.writing import new_folder, write_json, writing
from .source import inside, sha256
from .tensor_files import load_tensors, save_tensors

MANIFEST = "manifest.json"
RESTORE = "restore it from a copy"
_ARRAYS = "arrays.safetensors"
_CHECKPOINT = "checkpoint"
_STEP = re.compile(r"step_(\d+)")


class Manifest(TypedDict, Generic[T]):
    """Content of `manifest.json`."""

    kind: str
    metadata: T
    versions: dict[str, str]
    files: dict[str, str]  # SHA-256 by path


def save(
    folder: Path, kind: str, tree: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Save nested dicts of arrays, whose names have no slashes, and their metadata in a new folder of a kind."""
    arrays: dict[str, Any] = flatten_dict(dict(tree), sep="/")
    with new_folder(folder) as partial:
        save_tensors(partial / _ARRAYS, arrays)
        seal(partial, kind, metadata)
    with writing(folder.parent):
        _flush(folder.parent)


def load(
    folder: Path, kind: str, metadata: type[T] | Any = dict[str, Any]
) -> tuple[dict[str, Any], T]:
    """Return the tree of a saved folder, as read-only views of the mapped file, and its metadata as a type.

    Raises a FileError if the folder is of another kind, damaged, or of an earlier format.
    """
    manifest = read_manifest(folder, kind, metadata)
    check_files(folder, manifest["files"])
    arrays = load_tensors(folder / _ARRAYS)
    try:
        tree = unflatten_dict(arrays, sep="/")
    except (TypeError, ValueError, IndexError) as error:
        raise FileError(
            folder / _ARRAYS, got=f"no tree of arrays ({error})", fix=RESTORE
        ) from error
    return tree, manifest["metadata"]


def seal(folder: Path, kind: str, metadata: Mapping[str, Any]) -> None:
    """Write the manifest of a folder's files, and wait until all are on the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "kind": kind,
        "metadata": metadata,
        "versions": {"lorafusion-jax": __version__},
        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in paths},
    }
    write_json(folder / MANIFEST, manifest)
    for path in folder.rglob("*"):
        _flush(path)


def read_manifest(
    folder: Path, kind: str, metadata: type[T] | Any = dict[str, Any]
) -> Manifest[T]:
    """Return the manifest of a folder, with metadata of the type `metadata`; raises `load`'s errors."""
    path = folder / MANIFEST
    raw = read_json(path, dict[str, Any], f"a {kind}")
    if "kind" not in raw:
        versions = raw.get("versions")
        version = versions if isinstance(versions, dict) else {}
        raise FileError(
            path,
            got="of an earlier format",
            fix="make the folder again",
            version=str(version.get("lorafusion-jax", "unknown")),
        )
    if raw["kind"] != kind:
        raise FileError(
            path,
            field="kind",
            got=repr(raw["kind"]),
            expected=repr(kind),
            fix="give another folder",
            version=other_version(raw),
        )
    generic: Any = Manifest
    return decode_as(raw, generic[metadata], path)


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
    kind: str,
    metadata: type[T] | Any,
    *,
    note: Callable[[str], None],
) -> tuple[dict[str, Any], T] | None:
    """Return what `load` does of the last of some folders (oldest first) that exists and is sound, or None.

    Damaged folders behind it are renamed to NAME.damaged, NAME.damaged-2 and so on, so that they can be written again,
    and `note` is called with a line for each.

    Raises:
      FileError: this version cannot read the newest folder, because another one wrote it.
    """
    for folder in reversed(folders):
        if not folder.exists():
            continue
        try:
            return load(folder, kind, metadata)
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
            note(f"note: {error}. It is kept as {aside.name}")
            if processes.first():
                folder.rename(aside)
    return None


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


def load_newest(
    folders: Sequence[Path],
    state: Any,
    *,
    metadata: type[T] | Any = dict[str, Any],
    note: Callable[[str], None],
) -> tuple[Any, T] | None:
    """Return the tree of the last sound folder, as NumPy arrays, and its metadata (see `newest_sound`).

    `state` is a tree with the structure, shapes and dtypes that the result must have, or a FileError is raised.
    """
    sound = newest_sound(folders, _CHECKPOINT, metadata, note=note)
    if sound is None:
        return None
    tree, step_metadata = sound
    arrays = flatten_dict(tree, sep="/")
    expected = signature(state)
    check_signature(
        folders[-1].parent,
        signature(arrays),
        expected,
        fix=f"resume the run that saved it, or {RESTORE}",
    )
    leaves = [arrays[path] for path in expected]
    return jax.tree.unflatten(jax.tree.structure(state), leaves), step_metadata


def save_step(
    checkpoints: Path, step: int, state: Any, metadata: Mapping[str, Any], *, keep: int
) -> None:
    """Save `checkpoints / step_000123`, then remove all but the latest `keep` (>= 1).

    `state` is a tree of arrays, without PRNG keys (save their `jax.random.key_data`) and types of 4 bits.
    """
    arrays = dict(zip(signature(state), jax.tree.leaves(state), strict=True))
    save(checkpoints / f"step_{step:06d}", _CHECKPOINT, arrays, metadata)
    with writing(checkpoints):
        for old in [*steps(checkpoints).values()][:-keep]:
            shutil.rmtree(old)


def remove_later(checkpoints: Path, step: int) -> None:
    """Remove the saved steps after one."""
    with writing(checkpoints):
        for number, folder in steps(checkpoints).items():
            if number > step:
                shutil.rmtree(folder)


def steps(checkpoints: Path) -> dict[int, Path]:
    """Return the folders of the saved steps by their numbers, oldest first."""
    steps = {
        int(match[1]): path
        for path in checkpoints.glob("*")
        if (match := _STEP.fullmatch(path.name))
    }
    return dict(sorted(steps.items()))


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
