"""One adapter of a converted pool: its entry in the manifest, and its folder, which PEFT can load too."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from ...models.architecture import Architecture, linear_shapes
from ...support.reading import FileError
from ..buffers import release
from ..peft.adapter import CONFIG, WEIGHTS, PeftAdapter, read_adapter
from ..source import inside, sha256
from ..store import check_files
from .stack import Ranks, check_finite, pool_values, rank_table


class Entry(TypedDict):
    """An adapter in the manifest of a pool."""

    name: str
    source: str
    sha256: str  # of its weights at the source
    dtype: str
    parameters: int
    dora: bool
    sites: Annotated[Ranks, msgspec.Meta(min_length=1)]
    kept: list[str]  # keys of tensors that are not applied
    notes: list[str]
    folder: str


def describe(adapter: PeftAdapter, config: Architecture | None) -> dict[str, Any]:
    """Return an adapter's entry in the manifest, except its folder; its numbers are checked.

    Without the structure of the base, the entry has the paths of the modules instead of sites, and the base's name.
    """
    for path in adapter.factors:
        for kind, array in pool_values(adapter, path).items():
            check_finite(adapter, path, kind, array)
    arrays = [array for pair in adapter.factors.values() for array in pair]
    arrays += (adapter.magnitude or {}).values()
    ranks = {
        path: {"rank": [len(a)], "scaling": [adapter.scaling[path]]}
        for path, (a, _) in adapter.factors.items()
    }
    entry = {
        "name": adapter.name,
        "source": adapter.source,
        "sha256": sha256(adapter.weights),
        "dtype": ", ".join(sorted({str(array.dtype) for array in arrays})),
        "parameters": sum(array.size for array in arrays),
        "dora": adapter.magnitude is not None,
        "sites": rank_table(adapter, config) if config else ranks,
        "kept": sorted(adapter.kept),
        "notes": list(adapter.notes),
    }
    if config:
        return entry
    return entry | {"trained_on": adapter.config.get("base_model_name_or_path")}


def load_adapter(
    pool: Path, files: Mapping[str, str], entry: Entry, base: Architecture
) -> PeftAdapter:
    """Read an adapter of a pool by its entry; raises ValueError if its files, by digest, are missing or damaged."""
    folder = inside(pool, entry["folder"])
    names = [f"{entry['folder']}/{name}" for name in (CONFIG, WEIGHTS)]
    if missing := sorted(set(names) - files.keys()):
        got = f"the manifest lists no {' and no '.join(missing)}"
        raise FileError(pool, got=got, fix="convert the adapters again")
    check_files(pool, {name: files[name] for name in names})
    adapter = read_adapter(
        str(folder), shapes=linear_shapes(base), compared=entry["kept"]
    )
    # Its pages were read to check the numbers, and are not needed before the pool's arrays are filled.
    release(next(iter(adapter.factors.values()))[0])
    return dataclasses.replace(
        adapter, name=entry["name"], source=entry["source"], notes=tuple(entry["notes"])
    )
