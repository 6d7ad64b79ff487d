"""From adapters of PEFT to the stacked arrays of a `LoraPool`: scaling is folded into B, smaller ranks are padded.

Axis letters: L layer, N adapters, r rank.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from ...adapters.pool import LoraPool
from ...models.architecture import Architecture, linear_shapes, places
from ..buffers import aligned_zeros
from ..hf import Base
from ..peft.adapter import AdapterError, PeftAdapter, read_adapter
from ..peft.tensors import MAGNITUDE

Dtype = Literal["float32", "bfloat16"]


class SiteRanks(TypedDict):
    """Ranks and scalings of an adapter at a site, one for each layer, as the manifest holds them."""

    rank: list[Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]]
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
        raise ValueError(f"sources is {str(sources)!r}, one adapter: expected a list, read_pool([{str(sources)!r}])")
    shapes = linear_shapes(config)
    adapters = [read_adapter(source, shapes=shapes, base_tensor=base_tensor, base=base) for source in sources]
    stack = Stack([adapter.name for adapter in adapters], [rank_table(a, config) for a in adapters], config, dtype)
    for number, adapter in enumerate(adapters):
        stack.fill(number, adapter)
    return stack.pool()


class Stack:
    """A pool that is filled with one adapter at a time, from any thread.

    Stacked over layers and adapters, scaling folded into B, padded to the largest rank of each site.
    """

    def __init__(self, names: Sequence[str], tables: Sequence[Ranks], config: Architecture, dtype: Dtype):
        if not names:
            raise ValueError("a pool needs at least one adapter: none was given")
        self.names, self.magnitude, self.config = tuple(names), None, config
        self.A, self.B, self.rank, self.scaling = {}, {}, {}, {}
        for name, site in config.sites.items():
            if not any(name in table for table in tables):
                continue
            lacks: SiteRanks = {"rank": [0] * site.layers, "scaling": [0.0] * site.layers}
            rows = [table.get(name, lacks) for table in tables]
            self.rank[name] = rank = np.array([row["rank"] for row in rows], np.int32).T
            self.scaling[name] = np.array([row["scaling"] for row in rows], np.float32).T
            self.A[name] = aligned_zeros((*rank.shape, site.d_in, int(rank.max())), dtype)
            self.B[name] = aligned_zeros((*rank.shape, int(rank.max()), site.d_out), dtype)

    def fill(self, number: int, adapter: PeftAdapter) -> None:
        """Add the adapter with this number."""
        check_fits(adapter, self.names[:number], alone=len(self.names) == 1)
        magnitude: dict[str, np.ndarray] = {}
        if adapter.magnitude is not None:
            self.magnitude = magnitude = {site: np.zeros((len(b), b.shape[-1]), b.dtype) for site, b in self.B.items()}
        for path, (a, _) in adapter.factors.items():
            site, layer = located(path, self.config)
            r = a.shape[0]
            places = {"lora_A": self.A[site][layer, number, :, :r], "lora_B": self.B[site][layer, number, :r]}
            if adapter.magnitude is not None:
                places[MAGNITUDE] = magnitude[site][layer]
            for kind, values in pool_values(adapter, path).items():
                with np.errstate(over="ignore"):
                    places[kind][...] = values
                check_finite(adapter, path, kind, places[kind])

    def pool(self) -> LoraPool:
        """Return the filled pool."""
        return LoraPool(
            A={site: jax.device_put(a) for site, a in self.A.items()},
            B={site: jax.device_put(b) for site, b in self.B.items()},
            rank={site: jnp.asarray(rank) for site, rank in self.rank.items()},
            scaling={site: jnp.asarray(scaling) for site, scaling in self.scaling.items()},
            magnitude=None if self.magnitude is None else {s: jnp.asarray(m) for s, m in self.magnitude.items()},
            names=self.names,
        )


def check_fits(adapter: PeftAdapter, names: Collection[str], *, alone: bool) -> None:
    """Raise an AdapterError if an adapter's name is taken, or if it is a DoRA adapter and not `alone` in its pool."""
    if adapter.name in names:
        raise AdapterError(f"{adapter.source}: another adapter is named {adapter.name!r} already: rename one folder")
    if adapter.magnitude is not None and not alone:
        raise AdapterError(f"{adapter.source}: magnitudes cannot be mixed: convert it alone")


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
            "lora_B": b.astype(np.float32, copy=False).T * np.float32(adapter.scaling[path]),
        }
        if adapter.magnitude is not None:
            values[MAGNITUDE] = adapter.magnitude[path].astype(np.float32, copy=False)
    return values


def rank_table(adapter: PeftAdapter, config: Architecture) -> Ranks:
    """Return rank and scaling of each layer by site, 0 in a layer that the adapter lacks."""
    table: Ranks = {}
    for path, (a, _) in adapter.factors.items():
        site, layer = located(path, config)
        layers = config.sites[site].layers
        row = table.setdefault(site, {"rank": [0] * layers, "scaling": [0.0] * layers})
        row["rank"][layer], row["scaling"][layer] = a.shape[0], adapter.scaling[path]
    return {site: table[site] for site in config.sites if site in table}


def located(path: str, config: Architecture) -> tuple[str, int]:
    """Return the site and the layer of a module."""
    if path not in places(config):
        raise AdapterError(f"{path} cannot have an adapter: it is not a linear map of the base's blocks; leave it out")
    return places(config)[path]
