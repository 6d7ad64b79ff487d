"""One adapter of a converted pool: its entry in the manifest, and its folder of arrays and PEFT's configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...models.architecture import Architecture, Site
from ..checkpoint import read_arrays, read_json, write_arrays, write_json
from ..peft.adapter import AdapterError, PeftAdapter
from ..peft.config import scalings
from ..source import inside, sha256
from .stack import check_finite, located, pool_values, rank_table

_CONFIG = "adapter_config.json"
_KEYS = "keys.json"
# In the tree of arrays next to the sites: tensors of the source that are not applied, for an exact re-save.
_KEPT = "kept"

_Tree = dict[str, dict[str, np.ndarray]]


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


def save_adapter(folder: Path, adapter: PeftAdapter, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Write an adapter into a new folder of a pool and return the record of its arrays and files."""
    folder.mkdir(parents=True)
    record = write_arrays(folder, tree)
    (folder / _CONFIG).write_bytes(adapter.config_text)
    write_json(folder / _KEYS, adapter.keys)
    record["files"] |= {name: sha256(folder / name) for name in (_CONFIG, _KEYS)}
    return record


def load_adapter(pool: Path, entry: Mapping[str, Any], base: Architecture) -> PeftAdapter:
    """Read an adapter of a pool by its entry in the manifest.

    Raises:
      ValueError: a file is missing or damaged, or the entry is not of its arrays or its configuration.
    """
    folder = inside(pool, entry["folder"])
    if missing := {_CONFIG, _KEYS} - entry["files"].keys():
        raise ValueError(
            f"{folder}: the manifest lists no {' and no '.join(sorted(missing))}: convert the adapters again"
        )
    tree = read_arrays(folder, entry)
    _check_arrays(folder, entry, tree, base.sites)
    text = (folder / _CONFIG).read_bytes()
    config = json.loads(text)
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
        raise ValueError(
            f"{folder}: the manifest's scalings are not those of {_CONFIG}: restore it from a copy, "
            "or convert the adapters again"
        )
    return PeftAdapter(
        name=entry["name"],
        source=entry["source"],
        weights=folder / "arrays",
        config=config,
        config_text=text,
        factors=factors,
        scaling=scaling,
        magnitude=magnitude if entry["dora"] else None,
        keys={path: tuple(keys) for path, keys in read_json(folder / _KEYS, "an adapter of a pool").items()},
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


def _check_arrays(folder: Path, entry: Mapping[str, Any], tree: _Tree, shapes: Mapping[str, Site]) -> None:
    """Raise a ValueError where an adapter's arrays are not of the ranks that the manifest gives it."""
    if tree.keys() - {_KEPT} != entry["sites"].keys():
        raise ValueError(f"{folder}: the manifest lists other sites than its arrays are of: convert the adapters again")
    for site, row in entry["sites"].items():
        layers, d_in, d_out = shapes[site].layers, shapes[site].d_in, shapes[site].d_out
        ranks, r = row["rank"], tree[site]["A"].shape[1]
        wanted = {"A": (layers, r, d_in), "B": (layers, d_out, r)} | (
            {"magnitude": (layers, d_out)} if entry["dora"] else {}
        )
        fits = wanted == {name: array.shape for name, array in tree[site].items()} and len(ranks) == layers
        # Behind a layer's rank there is padding alone.
        if (
            not fits
            or max(ranks) != r
            or any(
                n < 0 or tree[site]["A"][layer, n:].any() or tree[site]["B"][layer, :, n:].any()
                for layer, n in enumerate(ranks)
            )
        ):
            raise ValueError(
                f"{folder}: {site} has ranks {ranks} in the manifest, which its arrays do not have: "
                "restore the manifest from a copy, or convert the adapters again"
            )
