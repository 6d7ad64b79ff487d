"""From adapters of PEFT to entries of a pool's manifest, and to the stacked arrays of a `LoraPool`.

Scaling is folded into B, and smaller ranks are padded.

Axis letters: L layer, N adapters, r rank.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import jax
import msgspec
import numpy as np

from ..adapters.pool import LoraPool
from ..models.architecture import Architecture, adaptable_shapes, places
from ..support.reading import FileError
from .hf import Base, aligned_zeros
from .peft.adapter import CONFIG, WEIGHTS, AdapterError, PeftAdapter, read_adapter
from .peft.tensors import MAGNITUDE
from .source import inside, release, sha256
from .store import check_files

Dtype = Literal["float32", "bfloat16"]
Rank = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]


class SiteRanks(TypedDict):
    """Ranks and scalings of an adapter at a site, one for each layer, as the manifest holds them."""

    rank: list[Rank]
    scaling: list[float]


Ranks = dict[str, SiteRanks]


def read_pool(
    sources: Sequence[str],
    config: Architecture,
    *,
    base_tensor: Callable[[str], np.ndarray] | None = None,
    base: Base | None = None,
    dtype: Dtype = "float32",
) -> LoraPool:
    """Read adapters of PEFT into a pool, without a converted pool on disk.

    Args:
      sources: folders or hub ids; their last parts are the names.
      config: structure of the base model.
      base_tensor: function of `io.hf.base_tensor` (name -> [d_out, d_in]), for adapters with copies of base weights.
      base: the base model, to be compared with the one that each adapter names.
      dtype: dtype of the pool's arrays.

    Raises:
      ValueError: an adapter cannot be used, or not together with the others; or `sources` is a single one.
    """
    if isinstance(sources, str | Path):
        raise ValueError(
            f"sources is {str(sources)!r}, one adapter: expected a list, read_pool([{str(sources)!r}])"
        )
    shapes = adaptable_shapes(config)
    adapters = [
        read_adapter(source, shapes=shapes, base_tensor=base_tensor, base=base)
        for source in sources
    ]
    return stacked(adapters, config, dtype)


def stacked(
    adapters: Sequence[PeftAdapter], config: Architecture, dtype: Dtype
) -> LoraPool:
    """Return adapters stacked over layers and modules, scaling folded into B, padded to the largest rank of each site.

    Raises an AdapterError for one that does not fit the others, or that `dtype` does not hold.
    """
    if not adapters:
        raise ValueError("a pool needs at least one adapter: none was given")
    names = tuple(adapter.name for adapter in adapters)
    for number, adapter in enumerate(adapters):
        check_fits(adapter, names[:number], alone=len(names) == 1)
    tables = [rank_table(adapter, config) for adapter in adapters]
    A = {}
    B = {}
    ranks = {}
    scaling = {}
    for name, site in config.adaptable.items():
        if not any(name in table for table in tables):
            continue
        lacks: SiteRanks = {"rank": [0] * site.layers, "scaling": [0.0] * site.layers}
        rows = [table.get(name, lacks) for table in tables]
        ranks[name] = rank = np.array([row["rank"] for row in rows], np.int32).T
        scaling[name] = np.array([row["scaling"] for row in rows], np.float32).T
        A[name] = aligned_zeros((*rank.shape, site.d_in, int(rank.max())), dtype)
        B[name] = aligned_zeros((*rank.shape, int(rank.max()), site.d_out), dtype)
    if adapters[0].magnitude is None:
        magnitude = None
    else:
        magnitude = {site: np.zeros(b[:, 0, 0].shape, b.dtype) for site, b in B.items()}

    def fill(number: int) -> None:
        adapter = adapters[number]
        for path, (a, _) in adapter.factors.items():
            site, layer = located(path, config)
            r = a.shape[0]
            places = {
                "lora_A": A[site][layer, number, :, :r],
                "lora_B": B[site][layer, number, :r],
            }
            if magnitude is not None:
                places[MAGNITUDE] = magnitude[site][layer]
            for kind, values in pool_values(adapter, path).items():
                with np.errstate(over="ignore"):
                    places[kind][...] = values
                check_finite(adapter, path, kind, places[kind])
            release(a)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(fill, range(len(adapters))))

    def put(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        # Not as one tree, whose sites JAX would sort.
        return {site: jax.device_put(array) for site, array in arrays.items()}

    return LoraPool(
        A=put(A),
        B=put(B),
        rank=put(ranks),
        scaling=put(scaling),
        magnitude=None if magnitude is None else put(magnitude),
        names=names,
    )


def check_fits(adapter: PeftAdapter, names: Collection[str], *, alone: bool) -> None:
    """Raise an AdapterError if an adapter's name is taken, or if it is a DoRA adapter and not `alone` in its pool."""
    if adapter.name in names:
        raise AdapterError(
            f"{adapter.source}: another adapter is named {adapter.name!r} already: rename one folder"
        )
    if adapter.magnitude is not None and not alone:
        raise AdapterError(
            f"{adapter.source}: magnitudes cannot be mixed: convert it alone"
        )


def check_finite(adapter: PeftAdapter, path: str, kind: str, array: np.ndarray) -> None:
    """Raise an AdapterError if a module's tensor [...] is infinite in the dtype and the scale of a pool."""
    if not np.isfinite(array).all():
        raise AdapterError(
            f"{adapter.source}: {path}.{kind} is infinite in {array.dtype} with the scaling {adapter.scaling[path]:g}: "
            "choose a dtype of wider range, or correct lora_alpha or the tensor"
        )


def pool_values(adapter: PeftAdapter, path: str) -> dict[str, np.ndarray]:
    """Return a module's arrays in a pool by kind: A [d_in, r], scaled B [r, d_out], DoRA's magnitude [d_out]."""
    a, b = adapter.factors[path]
    with np.errstate(over="ignore"):
        values = {
            "lora_A": a.astype(np.float32, copy=False).T,
            "lora_B": b.astype(np.float32, copy=False).T
            * np.float32(adapter.scaling[path]),
        }
        if adapter.magnitude is not None:
            values[MAGNITUDE] = adapter.magnitude[path].astype(np.float32, copy=False)
    return values


def rank_table(adapter: PeftAdapter, config: Architecture) -> Ranks:
    """Return rank and scaling of each layer by site, 0 in a layer that the adapter lacks."""
    table: Ranks = {}
    for path, (a, _) in adapter.factors.items():
        site, layer = located(path, config)
        layers = config.adaptable[site].layers
        row = table.setdefault(site, {"rank": [0] * layers, "scaling": [0.0] * layers})
        row["rank"][layer] = a.shape[0]
        row["scaling"][layer] = adapter.scaling[path]
    return {site: table[site] for site in config.adaptable if site in table}


def located(path: str, config: Architecture) -> tuple[str, int]:
    """Return the site and the layer of a module."""
    if path not in places(config):
        raise AdapterError(
            f"{path} cannot have an adapter: it is not a linear map of the base's blocks; leave it out"
        )
    return places(config)[path]


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
        str(folder), shapes=adaptable_shapes(base), compared=entry["kept"]
    )
    # Its pages were read to check the numbers, and are not needed before the pool's arrays are filled.
    release(next(iter(adapter.factors.values()))[0])
    return dataclasses.replace(
        adapter, name=entry["name"], source=entry["source"], notes=tuple(entry["notes"])
    )
