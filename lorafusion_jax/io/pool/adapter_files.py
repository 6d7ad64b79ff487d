"""One adapter of a converted pool: its entry in the manifest, and its folder, which PEFT can load too."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from ...models.architecture import Architecture, linear_shapes
from ...support.reading import FileError
from ...support.text import shown
from ..folders import check_files
from ..peft.adapter import CONFIG, WEIGHTS, PeftAdapter, read_adapter
from ..source import inside, sha256
from .stack import Ranks, check_finite, pool_values, rank_table

_AGAIN = "restore it from a copy, or convert the adapters again"


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
    files: dict[str, str]


def describe(adapter: PeftAdapter, config: Architecture) -> dict[str, Any]:
    """Return an adapter's entry in the manifest, except its folder and files; its numbers are checked."""
    for path in adapter.factors:
        for kind, array in pool_values(adapter, path).items():
            check_finite(adapter, path, kind, array)
    arrays = [array for pair in adapter.factors.values() for array in pair]
    arrays += (adapter.magnitude or {}).values()
    return {
        "name": adapter.name,
        "source": adapter.source,
        "sha256": sha256(adapter.weights),
        "dtype": ", ".join(sorted({str(array.dtype) for array in arrays})),
        "parameters": sum(array.size for array in arrays),
        "dora": adapter.magnitude is not None,
        "sites": rank_table(adapter, config),
        "kept": sorted(adapter.kept),
        "notes": list(adapter.notes),
    }


def check_entry(pool: Path, entry: Entry, base: Architecture) -> None:
    """Raise a FileError if an entry of the manifest contradicts the base."""
    folder = inside(pool, entry["folder"])
    for name, row in entry["sites"].items():
        site = base.sites.get(name)
        if site is None or {len(row["rank"]), len(row["scaling"])} != {site.layers}:
            got, expected = f"ranks {shown(row['rank'])}", "one for each layer of its base"
            raise FileError(folder, field=name, got=got, expected=expected, fix=_AGAIN)


def check_size(pool: Path, entry: Entry, base: Architecture) -> None:
    """Raise a FileError if the manifest states larger ranks than the adapter's file can hold."""
    path = inside(pool, entry["folder"]) / WEIGHTS
    sites = {name: base.sites[name] for name in entry["sites"]}
    numbers = sum(sum(entry["sites"][name]["rank"]) * (site.d_in + site.d_out) for name, site in sites.items())
    if path.is_file() and numbers > (size := path.stat().st_size):
        raise FileError(path, got=f"of {size:,} bytes, and the manifest states {numbers:,} numbers", fix=_AGAIN)


def load_adapter(pool: Path, entry: Entry, base: Architecture) -> PeftAdapter:
    """Read an adapter of a pool by its entry, which `check_entry` has checked; raises ValueError if it differs."""
    folder = inside(pool, entry["folder"])
    if missing := {CONFIG, WEIGHTS} - entry["files"].keys():
        got = f"the manifest lists no {' and no '.join(sorted(missing))}"
        raise FileError(folder, got=got, fix="convert the adapters again")
    check_files(folder, entry["files"])
    adapter = read_adapter(str(folder), shapes=linear_shapes(base), compared=entry["kept"])
    stated = entry["sites"] | {"dora": entry["dora"]}
    in_files = rank_table(adapter, base) | {"dora": adapter.magnitude is not None}
    for name in {**in_files, **stated}:
        if stated.get(name) != in_files.get(name):
            got, expected = (shown(values.get(name, "absent")) for values in (stated, in_files))
            got, expected = f"{got} in the manifest", f"{expected}, as in {WEIGHTS} and {CONFIG}"
            raise FileError(folder, field=name, got=got, expected=expected, fix=_AGAIN)
    return dataclasses.replace(adapter, name=entry["name"], source=entry["source"], notes=tuple(entry["notes"]))
