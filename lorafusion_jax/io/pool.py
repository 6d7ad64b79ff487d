"""A converted pool on disk, and from adapters to the stacked arrays of a `LoraPool`.

    manifest.json                        what there is, where it came from, a SHA-256 of every other file and of itself
    adapters/0000/arrays                 orbax: site -> A [L, r, d_in], B [L, d_out, r] (DoRA: magnitude [L, d_out])
    adapters/0000/adapter_config.json    PEFT's configuration, byte for byte
    adapters/0000/keys.json              how its file spelt the tensors' names

Factors, dtype and scaling stay as read, in PEFT's layouts, so that an adapter can be saved again exactly;
layers without an adapter are zeros of rank 0, smaller ranks are padded. In a `LoraPool` the scaling is in B.

Axis letters: L layer, N adapters, r rank.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters.pool import LoraPool, positions
from ..models.architecture import Architecture, Site, linear_shapes, places
from ..models.families import recorded_config
from .buffers import aligned_zeros
from .checkpoint import read_arrays, read_json, write_arrays, write_json
from .peft.adapter import AdapterError, PeftAdapter, read_adapter
from .peft.config import scalings
from .peft.tensors import MAGNITUDE
from .source import inside, sha256

_MANIFEST = "manifest.json"
_DIGEST = "sha256"
_CONFIG = "adapter_config.json"
_KEYS = "keys.json"
# In the tree of arrays beside the sites: tensors of the source that are not applied, for an exact re-save.
_KEPT = "kept"

_Tree = dict[str, dict[str, np.ndarray]]
_Dtype = Literal["float32", "bfloat16"]
# Site -> `rank` and `scaling`, a list over layers each, as in the manifest.
_Ranks = dict[str, dict[str, list]]


def read_pool(
    sources: Sequence[str],
    config: Architecture,
    *,
    base_tensor: Callable[[str], np.ndarray] | None = None,
    dtype: _Dtype = "float32",
) -> LoraPool:
    """Read adapters of PEFT straight into a pool, without a converted pool on disk.

    Args:
      sources: a list of folders or hub ids; their last parts are the names.
      config: of the base model.
      base_tensor: as in `peft.read_adapter`.
      dtype: of the pool's arrays.

    Raises:
      ValueError: an adapter cannot be used, or not next to the others; or `sources` is a single one.
    """
    if isinstance(sources, str | Path):
        raise ValueError(f"sources is {str(sources)!r}, a single adapter: wanted a list, read_pool([{str(sources)!r}])")
    # One after the other: what is left of reading is Python, which threads do not share out.
    shapes = linear_shapes(config)
    adapters = [read_adapter(source, shapes=shapes, base_tensor=base_tensor) for source in sources]
    stack = _Stack([adapter.name for adapter in adapters], [_table(a, config) for a in adapters], config, dtype)
    for number, adapter in enumerate(adapters):
        stack.fill(number, adapter)
    return stack.pool()


def load_pool(folder: str | Path, *, chosen: Sequence[str | int] | None = None, dtype: _Dtype = "float32") -> LoraPool:
    """Load a converted pool, or only the adapters chosen by name or index, in that order.

    What is not chosen is not read, and of what is, little more than the pool itself is in memory at any time.

    Raises:
      ValueError: the folder is no pool, a file is missing or damaged, or the pool has no such adapter.
    """
    if isinstance(chosen, str):
        raise ValueError(f"chosen is {chosen!r}, a single adapter: wanted a list, chosen=[{chosen!r}]")
    folder = Path(folder)
    manifest = read_manifest(folder)
    entries = manifest["adapters"]
    if chosen is not None:
        entries = [entries[index] for index in positions([entry["name"] for entry in entries], chosen)]
    config = recorded_config(manifest["base"])
    stack = _Stack([entry["name"] for entry in entries], [entry["sites"] for entry in entries], config, dtype)

    def fill(number: int) -> None:
        stack.fill(number, _load_adapter(folder, entries[number], config))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(fill, range(len(entries))))
    return stack.pool()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the manifest of a converted pool.

    Raises:
      ValueError: the folder is no converted pool, or its manifest was altered or states no digest of itself.
    """
    path = Path(folder) / _MANIFEST
    manifest = read_json(path, "a converted pool")
    if "adapters" not in manifest:
        raise ValueError(f"{path} lists no adapters: it is not the manifest of a converted pool")
    digest = manifest.pop(_DIGEST, None)
    if digest is None:
        raise ValueError(
            f"{path} states no SHA-256 of itself (it was edited, or is of an older version): convert the adapters again"
        )
    if digest != _digest(manifest):
        raise ValueError(
            f"{path}: damaged or altered, its SHA-256 is not the one that it states: "
            "restore it from a copy, or convert the adapters again"
        )
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a converted pool, with a SHA-256 of itself."""
    write_json(folder / _MANIFEST, {**manifest, _DIGEST: _digest(manifest)})


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_adapter_from_pool(folder: Path, name: str) -> PeftAdapter:
    """Read one adapter back as it was, tensors, names and configuration, for `peft.resave`.

    Raises:
      ValueError: the folder is no pool, has no such adapter, or a file is missing or damaged.
    """
    manifest = read_manifest(folder)
    entries = {entry["name"]: entry for entry in manifest["adapters"]}
    if name not in entries:
        raise ValueError(f"{folder} has no adapter {name!r}: it holds {', '.join(entries)}")
    return _load_adapter(folder, entries[name], recorded_config(manifest["base"]))


def check_base(manifest: Mapping[str, Any], config: Architecture) -> None:
    """Raise a ValueError if a pool was converted for a base model of another shape."""
    pool_sites = recorded_config(manifest["base"]).sites
    for name in {**pool_sites, **config.sites}:
        if pool_sites.get(name) != config.sites.get(name):
            raise ValueError(
                f"the pool was converted for {manifest['base']['source']}: {name} is {pool_sites.get(name)} there "
                f"and {config.sites.get(name)} here; convert the adapters for this base"
            )


def check_fits(adapter: PeftAdapter, names: Collection[str], *, alone: bool) -> None:
    """Refuse an adapter that cannot be in a pool with the others.

    Args:
      adapter: the one to check.
      names: of the adapters that the pool has already.
      alone: whether it is to be the pool's only one.

    Raises:
      AdapterError: its name is taken, or it is a DoRA adapter and not alone.
    """
    if adapter.name in names:
        raise AdapterError(f"{adapter.source}: another adapter is named {adapter.name!r} already: rename one folder")
    if adapter.magnitude is not None and not alone:
        raise AdapterError(
            f"{adapter.source}: a DoRA adapter has magnitudes of its own, which cannot be mixed: convert it alone"
        )


def describe(adapter: PeftAdapter, config: Architecture) -> tuple[dict[str, Any], _Tree]:
    """Return an adapter's entry in the manifest, but for its files, and the tree of arrays to write.

    Raises:
      AdapterError: the adapter's dtype changes from layer to layer of a site, or its numbers are infinite in a pool.
    """
    for path in adapter.factors:
        for kind, array in _values(adapter, path).items():
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
        "sites": _table(adapter, config),
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


def _load_adapter(pool: Path, entry: Mapping[str, Any], base: Architecture) -> PeftAdapter:
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


def check_finite(adapter: PeftAdapter, path: str, kind: str, array: np.ndarray) -> None:
    """Raise an AdapterError if numbers of an adapter are infinite in the dtype and the scale of a pool.

    Args:
      adapter: where they come from.
      path: of the module.
      kind: which of its tensors.
      array: the numbers as the pool holds them.
    """
    if not np.isfinite(array).all():
        raise AdapterError(
            f"{adapter.source}: {path}.{kind} is infinite in {array.dtype} with the scaling {adapter.scaling[path]:g}: "
            "choose a dtype of wider range, or correct lora_alpha or the tensor"
        )


def _values(adapter: PeftAdapter, path: str) -> dict[str, np.ndarray]:
    """Return what a pool holds of one module, by kind: A [d_in, r], scaled B [r, d_out], DoRA's magnitude [d_out]."""
    a, b = adapter.factors[path]
    with np.errstate(over="ignore"):
        values = {
            "lora_A": a.astype(np.float32, copy=False).T,
            "lora_B": b.astype(np.float32, copy=False).T * np.float32(adapter.scaling[path]),
        }
        if adapter.magnitude is not None:
            values[MAGNITUDE] = adapter.magnitude[path].astype(np.float32, copy=False)
    return values


def _by_site(adapter: PeftAdapter, config: Architecture) -> _Tree:
    """Stack an adapter over layers, in the layouts and the dtype of PEFT."""
    where: dict[str, dict[int, str]] = {}
    for path in adapter.factors:
        site, layer = _located(path, config)
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


def _table(adapter: PeftAdapter, config: Architecture) -> _Ranks:
    """Return site -> rank and scaling of every layer, 0 in a layer that the adapter lacks."""
    table: _Ranks = {}
    for path, (a, _) in adapter.factors.items():
        site, layer = _located(path, config)
        layers = config.sites[site].layers
        row = table.setdefault(site, {"rank": [0] * layers, "scaling": [0.0] * layers})
        row["rank"][layer], row["scaling"][layer] = a.shape[0], adapter.scaling[path]
    return {site: table[site] for site in config.sites if site in table}


class _Stack:
    """A pool that adapters are put into one by one, from any thread: their shapes are known before they are.

    Stacked over layers and adapters, scaling folded into B, padded to the largest rank of each site.
    """

    def __init__(self, names: Sequence[str], tables: Sequence[_Ranks], config: Architecture, dtype: _Dtype):
        if not names:
            raise ValueError("a pool needs at least one adapter: none was given")
        self.names, self.magnitude, self.config = tuple(names), None, config
        self.A, self.B, self.rank, self.scaling = {}, {}, {}, {}
        for name, site in config.sites.items():
            if not any(name in table for table in tables):
                continue
            lacks = {"rank": [0] * site.layers, "scaling": [0.0] * site.layers}
            rows = [table.get(name, lacks) for table in tables]
            self.rank[name] = rank = np.array([row["rank"] for row in rows], np.int32).T
            self.scaling[name] = np.array([row["scaling"] for row in rows], np.float32).T
            self.A[name] = aligned_zeros((*rank.shape, site.d_in, int(rank.max())), dtype)
            self.B[name] = aligned_zeros((*rank.shape, int(rank.max()), site.d_out), dtype)

    def fill(self, number: int, adapter: PeftAdapter) -> None:
        """Put in the adapter of this number."""
        check_fits(adapter, self.names[:number], alone=len(self.names) == 1)
        magnitude: dict[str, np.ndarray] = {}
        if adapter.magnitude is not None:
            self.magnitude = magnitude = {site: np.zeros((len(b), b.shape[-1]), b.dtype) for site, b in self.B.items()}
        for path, (a, _) in adapter.factors.items():
            site, layer = _located(path, self.config)
            r = a.shape[0]
            places = {"lora_A": self.A[site][layer, number, :, :r], "lora_B": self.B[site][layer, number, :r]}
            if adapter.magnitude is not None:
                places[MAGNITUDE] = magnitude[site][layer]
            for kind, values in _values(adapter, path).items():
                with np.errstate(over="ignore"):
                    places[kind][...] = values
                check_finite(adapter, path, kind, places[kind])

    def pool(self) -> LoraPool:
        """Return the pool; nothing may be put in any more."""
        return LoraPool(
            A={site: jax.device_put(a) for site, a in self.A.items()},
            B={site: jax.device_put(b) for site, b in self.B.items()},
            rank={site: jnp.asarray(rank) for site, rank in self.rank.items()},
            scaling={site: jnp.asarray(scaling) for site, scaling in self.scaling.items()},
            magnitude=None if self.magnitude is None else {s: jnp.asarray(m) for s, m in self.magnitude.items()},
            names=self.names,
        )


def _located(path: str, config: Architecture) -> tuple[str, int]:
    if path not in places(config):
        raise AdapterError(f"no adapter may sit at {path}: it is not a linear map of the base's blocks")
    return places(config)[path]
