"""A pool on disk as one object, whose manifest is read and checked once."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from ...adapters.basis import SharedBasis
from ...adapters.pool import LoraPool, positions
from ...models.architecture import Architecture, linear_shapes
from ...models.registry import recorded_config
from ...support.reading import (
    FileError,
    error_context,
    expand_user,
)
from ..hf import Base, base_tensor, open_base
from ..peft.adapter import PeftAdapter, read_adapter
from ..store import MANIFEST, read_manifest
from .adapter_files import Entry, load_adapter
from .basis import describe_basis, read_basis
from .stack import Dtype, read_pool, stacked

KIND = "pool"
_AGAIN = "restore it from a copy, or convert the adapters again"


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


class ConvertedPool:
    """A converted pool; ValueError if the folder is none.

    Attributes:
      folder: its folder.
      manifest: metadata of the pool.
      names: names of the adapters, in the pool's order.
      config: structure of the base model that it was converted for.
    """

    def __init__(self, folder: str | Path):
        self.folder = expand_user(folder)
        manifest = read_manifest(self.folder, KIND, Description)
        self.manifest = manifest["metadata"]
        self._files = manifest["files"]
        self.names = tuple(entry["name"] for entry in self.manifest["adapters"])
        with error_context(self.folder / MANIFEST):
            self.config = recorded_config(self.manifest["base"])
        for kind in ("name", "folder"):
            if len({entry[kind] for entry in self.manifest["adapters"]}) < len(
                self.names
            ):
                raise FileError(
                    self.folder / MANIFEST,
                    got=f"two adapters of one {kind}",
                    fix=_AGAIN,
                )

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
        return tuple(
            dict.fromkeys(
                site.rpartition(".")[2] for site in self.config.sites if site in adapted
            )
        )

    def load(
        self, chosen: Sequence[str | int] | None = None, *, dtype: Dtype = "float32"
    ) -> LoraPool:
        """Load the pool, as `load_pool` does."""
        if isinstance(chosen, str):
            raise ValueError(
                f"chosen is {chosen!r}, a single adapter: expected a list, chosen=[{chosen!r}]"
            )
        entries = self.manifest["adapters"]
        if chosen is not None:
            entries = [entries[index] for index in positions(self.names, chosen)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            adapters = list(
                threads.map(
                    lambda entry: load_adapter(
                        self.folder, self._files, entry, self.config
                    ),
                    entries,
                )
            )
        return stacked(adapters, self.config, dtype)

    def basis(self, k: int | None = None) -> SharedBasis:
        """Load the first k directions of the pool's shared basis, as `load_basis` does."""
        return read_basis(self.folder, k, made_of=self.made_of, config=self.config)

    def check_basis(self, k: int) -> None:
        """Raise a ValueError if the pool has no shared basis of k directions."""
        describe_basis(self.folder, k)

    @property
    def made_of(self) -> dict[str, str]:
        """Name of every adapter -> SHA-256 of its weights."""
        return {entry["name"]: entry["sha256"] for entry in self.manifest["adapters"]}

    def adapter(self, name: str) -> PeftAdapter:
        """Read the original adapter, for `peft.resave`; raises ValueError if it is missing or damaged."""
        if name not in self.names:
            raise ValueError(
                f"{self.folder} has no adapter {name!r}: it holds {', '.join(self.names)}; name one"
            )
        entry = self.manifest["adapters"][self.names.index(name)]
        return load_adapter(self.folder, self._files, entry, self.config)

    def check_base(self, config: Architecture) -> None:
        """Raise a ValueError if the pool was converted for a base model with other shapes."""
        for name in {**self.config.sites, **config.sites}:
            pool_site = self.config.sites.get(name)
            base_site = config.sites.get(name)
            if pool_site != base_site:
                raise ValueError(
                    f"the pool was converted for {self.manifest['base']['source']}: {name} is {pool_site} there "
                    f"and {base_site} here; convert the adapters for this base"
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
        shapes = linear_shapes(self.config) if self.base else None
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
