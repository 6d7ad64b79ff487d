"""One adapter of a converted pool: its entry in the manifest, and its folder of arrays and PEFT's configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from ...files import FileError, read_json, shown
from ...models.architecture import Architecture
from ..checkpoint import Record, read_arrays, write_arrays, write_json
from ..peft.adapter import AdapterError, PeftAdapter, read_config_file
from ..peft.config import check_config, scalings
from ..source import inside, sha256
from .stack import Ranks, check_finite, located, pool_values, rank_table

_CONFIG = "adapter_config.json"
_KEYS = "keys.json"
# In the tree of arrays next to the sites: tensors of the source that are not applied, for an exact re-save.
_KEPT = "kept"
_AGAIN = "restore it from a copy, or convert the adapters again"

_Tree = dict[str, dict[str, np.ndarray]]


class Entry(Record):
    """An adapter in the manifest of a pool."""

    name: str
    source: str
    sha256: str  # of its weights
    dtype: str
    parameters: int
    dora: bool
    sites: Annotated[Ranks, msgspec.Meta(min_length=1)]
    notes: list[str]
    folder: str


def describe(adapter: PeftAdapter, config: Architecture) -> tuple[dict[str, Any], _Tree]:
    """Return an adapter's entry in the manifest, but for its files, and the tree of arrays to write.

    Raises:
      AdapterError: the adapter's dtype changes from layer to layer of a site, or its numbers are infinite in a pool.
    """
    for path in adapter.factors:
        for kind, array in pool_values(adapter, path).items():
            check_finite(adapter, path, kind, array)
    arrays = [array for pair in adapter.factors.values() for array in pair]
    arrays += (adapter.magnitude or {}).values()
    entry = {
        "name": adapter.name,
        "source": adapter.source,
        "sha256": sha256(adapter.weights),
        "dtype": ", ".join(sorted({str(array.dtype) for array in arrays})),
        "parameters": sum(array.size for array in arrays),
        "dora": adapter.magnitude is not None,
        "sites": rank_table(adapter, config),
        "notes": list(adapter.notes),
    }
    return entry, _by_site(adapter, config)


def save_adapter(folder: Path, adapter: PeftAdapter, tree: Mapping[str, Any]) -> Record:
    """Write an adapter into a new folder of a pool and return the record of its arrays and files."""
    folder.mkdir(parents=True)
    record = write_arrays(folder, tree)
    (folder / _CONFIG).write_bytes(adapter.config_text)
    write_json(folder / _KEYS, adapter.keys)
    record["files"] |= {name: sha256(folder / name) for name in (_CONFIG, _KEYS)}
    return record


def check_entry(pool: Path, entry: Entry, base: Architecture) -> None:
    """Raise a FileError where an entry of the manifest contradicts itself or the base, before anything is allocated."""
    folder = inside(pool, entry["folder"])
    recorded: dict[str, dict[str, str]] = {}
    for path, text in entry["arrays"].items():
        site, _, name = path.partition("/")
        recorded.setdefault(site, {})[name] = text[text.find("[") :]
    if recorded.keys() - {_KEPT} != entry["sites"].keys() or entry["sites"].keys() - base.sites.keys():
        got = "the manifest lists other sites than its arrays are of, or than its base has"
        raise FileError(folder, got=got, fix="convert the adapters again")
    for name, row in entry["sites"].items():
        site, ranks = base.sites[name], row["rank"]
        r = max(ranks, default=0)
        wanted = {"A": [site.layers, r, site.d_in], "B": [site.layers, site.d_out, r]}
        if entry["dora"]:
            wanted["magnitude"] = [site.layers, site.d_out]
        fits = recorded[name] == {part: str(shape) for part, shape in wanted.items()}
        if not fits or len(ranks) != site.layers or len(row["scaling"]) != site.layers:
            raise _other_ranks(folder, name, ranks)


def load_adapter(pool: Path, entry: Entry, base: Architecture) -> PeftAdapter:
    """Read an adapter of a pool by its entry in the manifest, which `check_entry` has checked.

    Raises:
      ValueError: a file is missing or damaged, or the entry is not of its arrays or its configuration.
    """
    folder = inside(pool, entry["folder"])
    if missing := {_CONFIG, _KEYS} - entry["files"].keys():
        got = f"the manifest lists no {' and no '.join(sorted(missing))}"
        raise FileError(folder, got=got, fix="convert the adapters again")
    tree = read_arrays(folder, entry)
    _check_padding(folder, entry, tree)
    text, config = read_config_file(folder)
    check_config(config, where=str(folder / _CONFIG), compare_saved=True)
    factors, scaling, magnitude = {}, {}, {}
    for site, row in entry["sites"].items():
        for layer, (rank, scale) in enumerate(zip(row["rank"], row["scaling"], strict=True)):
            if rank:
                path = base.sites[site].path_of(layer)
                factors[path] = tree[site]["A"][layer, :rank], tree[site]["B"][layer, :, :rank]
                scaling[path] = scale
                if entry["dora"]:
                    magnitude[path] = tree[site]["magnitude"][layer]
    ranks = {path: len(a) for path, (a, _) in factors.items()}
    if scaling != scalings(config, ranks, where=str(folder))[0]:
        raise FileError(folder, got=f"the manifest's scalings are not those of {_CONFIG}", fix=_AGAIN)
    keys = read_json(folder / _KEYS, dict[str, tuple[str, ...]], "an adapter of a pool")
    if {path: len(names) for path, names in keys.items()} != dict.fromkeys(factors, 3 if entry["dora"] else 2):
        raise FileError(folder / _KEYS, got="other names than of the adapter's tensors", fix=_AGAIN)
    return PeftAdapter(
        name=entry["name"],
        source=entry["source"],
        weights=folder / "arrays",
        config=config,
        config_text=text,
        factors=factors,
        scaling=scaling,
        magnitude=magnitude if entry["dora"] else None,
        keys=keys,
        kept=tree.get(_KEPT, {}),
        notes=tuple(entry["notes"]),
    )


def _by_site(adapter: PeftAdapter, config: Architecture) -> _Tree:
    """Stack an adapter over layers, in the layouts and the dtype of PEFT."""
    where: dict[str, dict[int, str]] = {}
    for path in adapter.factors:
        site, layer = located(path, config)
        where.setdefault(site, {})[layer] = path

    def stacked(site: str, shape: tuple[int, ...], arrays: Mapping[int, np.ndarray]) -> np.ndarray:
        dtypes = {array.dtype for array in arrays.values()}
        if len(dtypes) > 1:
            raise AdapterError(
                f"{adapter.source}: {site} mixes {' and '.join(sorted(map(str, dtypes)))}: "
                "choose one dtype (--dtype float32)"
            )
        out = np.zeros((config.sites[site].layers, *shape), dtypes.pop())
        for layer, array in arrays.items():
            out[layer][tuple(slice(size) for size in array.shape)] = array
        return out

    tree: _Tree = {}
    for site, paths in where.items():
        pairs = {layer: adapter.factors[path] for layer, path in paths.items()}
        rank = max(a.shape[0] for a, _ in pairs.values())
        d_in, d_out = config.sites[site].d_in, config.sites[site].d_out
        tree[site] = {
            "A": stacked(site, (rank, d_in), {layer: a for layer, (a, _) in pairs.items()}),
            "B": stacked(site, (d_out, rank), {layer: b for layer, (_, b) in pairs.items()}),
        }
        if adapter.magnitude is not None:
            magnitudes = {layer: adapter.magnitude[path] for layer, path in paths.items()}
            tree[site]["magnitude"] = stacked(site, (d_out,), magnitudes)
    if adapter.kept:
        tree[_KEPT] = adapter.kept
    return tree


def _check_padding(folder: Path, entry: Entry, tree: _Tree) -> None:
    """Raise a FileError where an adapter's arrays hold numbers behind the ranks that the manifest gives it."""
    for site, row in entry["sites"].items():
        a, b = tree[site]["A"], tree[site]["B"]
        if any(a[layer, rank:].any() or b[layer, :, rank:].any() for layer, rank in enumerate(row["rank"])):
            raise _other_ranks(folder, site, row["rank"])


def _other_ranks(folder: Path, site: str, ranks: list[int]) -> FileError:
    got = f"{site} has ranks {shown(ranks)} in the manifest, which its arrays do not have"
    return FileError(folder, got=got, fix=_AGAIN)
