"""Sources of weights: a local folder or a hub id, and the checks of every file."""

import hashlib
import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..support.reading import FileError, check_lfs, expand_user
from ..support.text import HUB_ID, is_file_name

COMPILED = "_orig_mod."  # torch.compile puts it before the names of a model's tensors
_LONGEST_REASON = 1000  # characters of an error, whose text a hub may write
_SHA256 = re.compile("[0-9a-f]{64}")


def is_hub_id(source: str) -> bool:
    """Return whether a source is `owner/name` or `owner/name@revision` on the hub, and not a local path."""
    return (
        HUB_ID.fullmatch(source) is not None
        and not is_file_name(source)
        and not expand_user(source).exists()
    )


def split_revision(source: str) -> tuple[str, str | None]:
    """Return `owner/name` and the revision (or None) of a hub id; of a local path itself, and None."""
    hub_id = HUB_ID.fullmatch(source) if is_hub_id(source) else None
    return (source, None) if hub_id is None else (hub_id[1], hub_id[2])


def resolve(source: str, *, patterns: Sequence[str] | None) -> Path:
    """Return the local folder of a source; a hub id is fetched first: files of these glob patterns, None for all.

    Raises:
        ValueError: The source is neither a folder nor a hub id that can be fetched. With HF_HUB_OFFLINE, only cached
            files can be.
    """
    folder = expand_user(source)
    try:
        if source and folder.is_dir():
            return folder
        if folder.is_file():
            raise ValueError(f"{source} is a file: give the folder that holds it")
    except OSError as error:  # a name that is too long
        raise ValueError(
            f"{source!r} cannot be a folder: {error.strerror}; shorten its name"
        ) from None
    if not is_hub_id(source):
        raise ValueError(
            f"{source!r} is neither a folder here nor a hub id: give a path, owner/name or owner/name@rev"
        )
    name, revision = split_revision(source)
    try:
        return _fetched(name, revision, patterns)
    except FileError:
        raise
    except Exception as error:  # the HTTP library, and answers that the hub's library does not expect, raise others
        raise ValueError(
            f"{source!r} is not a folder here, and the hub did not give it: {_reason(error)}"
        ) from error


def _fetched(name: str, revision: str | None, patterns: Sequence[str] | None) -> Path:
    """Return the folder of a hub's repository in the cache; FileError if its files are elsewhere or damaged."""
    from huggingface_hub import constants, snapshot_download

    cache = Path(constants.HF_HUB_CACHE).resolve()
    blobs = cache / f"models--{name.replace('/', '--')}" / "blobs"
    before = {*blobs.iterdir()} if blobs.is_dir() else set[Path]()
    folder = Path(
        snapshot_download(
            name, revision=revision, allow_patterns=list(patterns) if patterns else None
        )
    )
    for path in (folder, *folder.rglob("*")):
        stored = path.resolve()
        if not stored.is_relative_to(cache):
            raise FileError(
                path,
                got="outside of the hub's cache",
                expected=f"a file in {cache}",
                fix="remove it",
            )
        # Large files are stored under their SHA-256. The library checks sizes.
        if (
            stored not in before
            and _SHA256.fullmatch(stored.name)
            and sha256(stored) != stored.name
        ):
            stored.unlink()
            raise FileError(
                path,
                got="damaged, its SHA-256 is not the one that the hub states",
                fix="fetch it again",
            )
    return folder


def _reason(error: Exception) -> str:
    """Return why the hub refused, and how to fix it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    login = "run `hf auth login` or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return (
            f"access is restricted: request it on the repository's page, then {login}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it is private: check the spelling, or {login}"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision: check the text after the @"
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)[
        :_LONGEST_REASON
    ]
    return f"{first} (check the spelling, the network and HF_HUB_OFFLINE)"


def other_layout(folder: Path) -> str:
    """Return what a folder has instead of Hugging Face's files and the remedy, or nothing if that is unknown."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    if checkpoints:
        last = max(checkpoints, key=lambda path: (len(path.name), path.name))
        return f"it holds checkpoints of a training: give one of them, such as {last}"
    advice = "give the model in Hugging Face's format, which has config.json and model*.safetensors"
    if any(folder.glob("consolidated.*.pth")):
        converter = "transformers' convert_llama_weights_to_hf.py writes it"
        return f"it has Meta's own layout (consolidated.00.pth): {advice}; {converter}"
    if (
        any(folder.glob("consolidated*.safetensors"))
        or (folder / "params.json").is_file()
    ):
        place = "most repositories have both"
        return f"it has Mistral's own layout (consolidated.safetensors, params.json): {advice}; {place}"
    return ""


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name` for a name from a file; raises FileError if it is outside."""
    # Links are not resolved: the hub's cache keeps every file as a link to another folder.
    if not name or Path(name).is_absolute() or ".." in re.split(r"[/\\]", name):
        raise FileError(
            folder,
            field=repr(name),
            got="not a file inside this folder",
            fix="correct the name",
        )
    return folder / name


def map_file(path: Path) -> mmap.mmap:
    """Return a file's bytes, mapped read-only; raises ValueError if it is missing, empty, or a Git LFS pointer."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file: fetch it, or correct the path")
    check_lfs(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty: fetch it again")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def release(tensor: Any) -> None:
    """Unmap the pages of a file whose tensor was read, which would count as memory of this process."""
    owner = tensor.base.obj if isinstance(tensor.base, memoryview) else tensor.base
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, or of the digests of a folder's files, in hexadecimal digits."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path)} {sha256(file)}" for file in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
