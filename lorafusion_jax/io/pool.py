"""Pools of adapters on disk: converted ones, and folders of PEFT adapter folders.

    manifest.json                        adapters, their sources, a SHA-256 of each other file (see `store`)
    adapters/0000/                       an adapter that PEFT can load:
        adapter_config.json              its configuration, byte for byte
        adapter_model.safetensors        its tensors, with the names of the original file
    basis/                               a shared basis of the modules, if one was made:
        manifest.json                    number of directions, the modules and what they were made of, the base, ranks
        arrays.safetensors               U, V, S and energy by site (see `adapters.basis.SharedBasis`): `U/SITE`, ...

In a `LoraPool` the scaling is in B, layers without an adapter are zeros of rank 0, and smaller ranks are padded.
Loading a basis reads no adapter.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypedDict

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from ..adapters.basis import SharedBasis
from ..adapters.pool import LoraPool, positions
from ..models.architecture import Architecture, adaptable_shapes
from ..models.registry import recorded_config
from ..support.reading import FileError, error_context, expand_user
from . import store
from .hf import Base, base_tensor, open_base
from .peft.adapter import PeftAdapter, read_adapter
from .pool_arrays import Dtype, Entry, Rank, load_adapter, read_pool, stacked
from .store import MANIFEST, RESTORE

KIND = "pool"
_AGAIN = f"{RESTORE}, or convert the adapters again"
_BASIS = "shared basis"
_FIELDS = ("U", "V", "S", "energy")


class BaseRecord(TypedDict):
    """Record of the base model in a manifest."""

    source: str
    config_sha256: str
    family: str
    config: dict[str, Any]


class Skipped(TypedDict):
    """An adapter that was left out."""

    source: str
    reason: str


class Description(TypedDict):
    """Metadata of a converted pool."""

    base: BaseRecord
    cast_to: str | None
    adapters: Annotated[list[Entry], msgspec.Meta(min_length=1)]
    skipped: list[Skipped]
    totals: dict[str, int]


class BasisDescription(TypedDict):
    """Metadata of a basis; `modules` has the SHA-256 of each adapter's weights."""

    k: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    modules: dict[str, str]
    rank: dict[str, list[list[Rank]]]
    base: dict[str, Any]


class ConvertedPool:
    """A converted pool, whose manifest is read and checked once; ValueError if the folder is none.

    Attributes:
      folder: its folder.
      basis_folder: folder of its shared basis, which need not exist.
      manifest: metadata of the pool.
      names: names of the adapters, in the pool's order.
      config: structure of the base model that it was converted for.
    """

    def __init__(self, folder: str | Path):
        self.folder = expand_user(folder)
        self.basis_folder = self.folder / "basis"
        manifest = store.read_manifest(self.folder, KIND, Description)
        self.manifest = manifest["metadata"]
        self._files = manifest["files"]
        entries = self.manifest["adapters"]
        self.names = tuple(entry["name"] for entry in entries)
        with error_context(self.folder / MANIFEST):
            self.config = recorded_config(self.manifest["base"])
            for kind in ("name", "folder"):
                if len({entry[kind] for entry in entries}) < len(entries):
                    raise FileError("", got=f"two adapters of one {kind}", fix=_AGAIN)

    @property
    def largest_rank(self) -> int:
        """The largest rank that an adapter has anywhere."""
        return max(
            max(row["rank"])
            for entry in self.manifest["adapters"]
            for row in entry["sites"].values()
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """Last names of the linear maps that any adapter is on."""
        adapted = {
            site for entry in self.manifest["adapters"] for site in entry["sites"]
        }
        sites = [site for site in self.config.adaptable if site in adapted]
        return tuple(dict.fromkeys(site.rpartition(".")[2] for site in sites))

    def load(
        self, chosen: Sequence[str | int] | None = None, *, dtype: Dtype = "float32"
    ) -> LoraPool:
        """Load the pool, as `load_pool` does."""
        entries = self.manifest["adapters"]
        if chosen is not None:
            entries = [entries[index] for index in positions(self.names, chosen)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            adapters = list(threads.map(self._adapter, entries))
        return stacked(adapters, self.config, dtype)

    def adapter(self, name: str) -> PeftAdapter:
        """Read the original adapter, for `peft.resave`; raises ValueError if it is missing or damaged."""
        (index,) = positions(self.names, [name])
        return self._adapter(self.manifest["adapters"][index])

    def _adapter(self, entry: Entry) -> PeftAdapter:
        return load_adapter(self.folder, self._files, entry, self.config)

    def check_base(self, config: Architecture) -> None:
        """Raise a ValueError if the pool was converted for a base model with other shapes."""
        for name in {**self.config.adaptable, **config.adaptable}:
            pool_site = self.config.adaptable.get(name)
            base_site = config.adaptable.get(name)
            if pool_site != base_site:
                raise ValueError(
                    f"the pool was converted for {self.manifest['base']['source']}: {name} is {pool_site} there "
                    f"and {base_site} here; convert the adapters for this base"
                )

    def basis(self, k: int | None = None) -> SharedBasis:
        """Load the first k directions of the pool's shared basis, as `load_basis` does."""
        description = self.check_basis(k)
        if description["modules"] != self._digests:
            raise ValueError(
                f"{self.basis_folder} is the basis of other adapters than those of {self.folder}. "
                f"Move it away, and {self._make_basis(description['k'])}"
            )
        tree, _ = store.load(self.basis_folder, _BASIS, BasisDescription)
        self._check_basis_shapes(tree, description)
        fields: dict[str, Any] = {
            field: jax.tree.map(jnp.asarray, tree[field]) for field in _FIELDS
        }
        ranks = description["rank"]
        basis = SharedBasis(
            **fields,
            rank={site: jnp.asarray(rank, jnp.int32) for site, rank in ranks.items()},
            names=tuple(description["modules"]),
            sites=tuple(site for site in self.config.adaptable if site in ranks),
        )
        return basis if k is None else basis.first(k)

    def save_basis(self, basis: SharedBasis) -> None:
        """Write a basis of the pool next to the adapters; raises ValueError if there is one."""
        tree = {
            field: {site: np.asarray(a) for site, a in getattr(basis, field).items()}
            for field in _FIELDS
        }
        metadata = {
            "k": basis.k,
            "modules": {name: self._digests[name] for name in basis.names},
            "rank": {site: np.asarray(r).tolist() for site, r in basis.rank.items()},
            "base": self.manifest["base"],
        }
        store.save(self.basis_folder, _BASIS, tree, metadata)

    @property
    def _digests(self) -> dict[str, str]:
        """SHA-256 of the weights of every adapter, by name."""
        return {entry["name"]: entry["sha256"] for entry in self.manifest["adapters"]}

    def _make_basis(self, k: int) -> str:
        return f"make one with `lorafusion convert --basis {k} --out {self.folder}`"

    def check_basis(self, k: int | None) -> BasisDescription:
        """Return the metadata of the shared basis; raises a ValueError if the pool has none of k directions."""
        if not (self.basis_folder / MANIFEST).is_file():
            raise ValueError(f"{self.folder} has no basis: {self._make_basis(k or 32)}")
        manifest = store.read_manifest(self.basis_folder, _BASIS, BasisDescription)
        description = manifest["metadata"]
        if k is not None and k > description["k"]:
            raise ValueError(
                f"{self.folder} has a shared basis of {description['k']} directions, expected at least {k}: use fewer, "
                f"or move {self.basis_folder} away and {self._make_basis(k)}"
            )
        return description

    def _check_basis_shapes(
        self, tree: Mapping[str, Any], description: BasisDescription
    ) -> None:
        """Raise a FileError if the arrays of the basis are not those of its description, or are of another base."""
        k = description["k"]
        modules = len(description["modules"])
        expected = {}
        for name, rank in description["rank"].items():
            site = self.config.adaptable.get(name)
            if site is None or [len(row) for row in rank] != [modules] * site.layers:
                raise FileError(
                    self.basis_folder,
                    field=name,
                    got=f"ranks of {len(rank)} layers",
                    expected="those of each of its modules in every layer of its base",
                    fix=RESTORE,
                )
            shapes = {
                "U": (site.d_in, k),
                "V": (k, site.d_out),
                "S": (modules, k, k),
                "energy": (modules,),
            }
            expected |= {
                f"{field}/{name}": f"float32{[site.layers, *shape]}"
                for field, shape in shapes.items()
            }
        store.check_signature(
            self.basis_folder, store.signature(tree), expected, fix=RESTORE
        )


class AdapterFolders:
    """A folder of PEFT adapter folders, which are read for a base model without being converted.

    Attributes:
      folder: the folder.
      names: names of the adapters' folders, sorted.
      base: the base model; without it nothing can be loaded.
    """

    def __init__(self, folder: str | Path, base: Base | None = None):
        self.folder = expand_user(folder)
        self.base = base
        self.names = tuple(
            sorted(
                path.parent.name
                for path in self.folder.glob("[!.]*/adapter_config.json")
            )
        )
        if not self.names:
            raise ValueError(
                f"{folder} is not a pool: give one of `lorafusion convert`, or a folder of PEFT adapters"
            )

    @property
    def config(self) -> Architecture:
        """The structure of the base model."""
        return self._base.config

    @property
    def largest_rank(self) -> int:
        """The largest rank that an adapter has anywhere; reads the adapters."""
        return max(
            len(a) for adapter in self._adapters for a, _ in adapter.factors.values()
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """Last names of the linear maps that any adapter is on; reads the adapters."""
        return tuple(
            sorted(
                {
                    path.rpartition(".")[2]
                    for adapter in self._adapters
                    for path in adapter.factors
                }
            )
        )

    def load(
        self, chosen: Sequence[str | int] | None = None, *, dtype: Dtype = "float32"
    ) -> LoraPool:
        """Read the adapters chosen by name or index, or all; raises `read_pool`'s errors."""
        if chosen is None:
            names = self.names
        else:
            names = [self.names[index] for index in positions(self.names, chosen)]
        sources = [str(self.folder / name) for name in names]
        tensor = base_tensor(self._base)
        return read_pool(
            sources, self.config, base_tensor=tensor, base=self._base, dtype=dtype
        )

    def basis(self, k: int | None = None) -> SharedBasis:
        """Raise a ValueError: only a converted pool has a basis."""
        raise ValueError(
            f"{self.folder} holds adapters, no basis: make one by `lorafusion convert --basis {k or 32}`"
        )

    def check_basis(self, k: int) -> None:
        """Raise a ValueError, as `basis` does."""
        self.basis(k)

    @functools.cached_property
    def _adapters(self) -> list[PeftAdapter]:
        # Copies of base weights need the base.
        shapes = adaptable_shapes(self.config) if self.base else None
        tensor = base_tensor(self._base) if self.base else None
        return [
            read_adapter(str(self.folder / name), shapes=shapes, base_tensor=tensor)
            for name in self.names
        ]

    @property
    def _base(self) -> Base:
        if self.base is None:
            raise ValueError(
                f"{self.folder} holds adapters of PEFT, which are read for a base model: give its base"
            )
        return self.base


def open_pool(
    folder: str | Path, base: str | Path | Base | None = None
) -> ConvertedPool | AdapterFolders:
    """Open a converted pool, or a folder of PEFT adapter folders, without its arrays.

    The base (folder, hub id or GGUF file) is needed to load PEFT adapters, and checked against a converted pool.

    Raises:
      ValueError: the folder is neither, or it was converted for a base of another shape.
    """
    opened = None if base is None else open_base(base)
    if not (expand_user(folder) / MANIFEST).is_file():
        return AdapterFolders(folder, opened)
    pool = ConvertedPool(folder)
    if opened is not None:
        pool.check_base(opened.config)
    return pool


def load_pool(
    folder: str | Path,
    *,
    chosen: Sequence[str | int] | None = None,
    dtype: Dtype = "float32",
) -> LoraPool:
    """Load a converted pool, or only the adapters chosen by name or index, in that order.

    Peak memory is little more than the loaded pool.

    Raises:
      ValueError: the folder is not a pool, a file is missing or damaged, or the pool has no such adapter.
    """
    return ConvertedPool(folder).load(chosen, dtype=dtype)


def load_basis(folder: str | Path, k: int | None = None) -> SharedBasis:
    """Load the first k directions (by default all) of the shared basis of a converted pool, without its adapters.

    Raises:
      ValueError: the folder is not a pool, its basis has fewer directions, or a file is missing or damaged.
    """
    return ConvertedPool(folder).basis(k)
