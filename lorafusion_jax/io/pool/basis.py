"""A pool's shared basis on disk, in the folder `basis` next to the adapters; loading it reads no adapter.

Files:
    basis/manifest.json         k, the modules and what they were made of, the base, ranks, a SHA-256 of the file
    basis/arrays.safetensors    U, V, S and energy by site (see `adapters.basis.SharedBasis`): `U/SITE`, ...
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from ...adapters.basis import SharedBasis
from ...models.architecture import Architecture
from ...support.reading import FileError
from .. import store
from ..store import MANIFEST, RESTORE

FOLDER = "basis"
_FIELDS = ("U", "V", "S", "energy")
_KIND = "shared basis"


class Description(TypedDict):
    """Metadata of a basis; `modules` has the SHA-256 of each adapter's weights."""

    k: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    modules: dict[str, str]
    rank: dict[str, list[list[Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]]]]
    base: dict[str, Any]


def save_basis(
    folder: Path,
    basis: SharedBasis,
    *,
    made_of: Mapping[str, str],
    base: Mapping[str, Any],
) -> None:
    """Write a basis into the folder of its pool; raises ValueError if the pool has one.

    `made_of` is the SHA-256 of each module's adapter, and `base` the pool's record of its base model.
    """
    tree = {
        field: {s: np.asarray(a) for s, a in getattr(basis, field).items()}
        for field in _FIELDS
    }
    rank = {site: np.asarray(rank).tolist() for site, rank in basis.rank.items()}
    metadata = {
        "k": basis.k,
        "modules": {name: made_of[name] for name in basis.names},
        "rank": rank,
        "base": base,
    }
    store.save(folder / FOLDER, _KIND, tree, metadata)


def describe_basis(folder: Path, k: int | None = None) -> Description:
    """Return the metadata of a pool's basis; raises ValueError if it has none with at least k directions."""
    if not (folder / FOLDER / MANIFEST).is_file():
        raise ValueError(
            f"{folder} has no basis: make one with `lorafusion convert --basis {k or 32} --out {folder}`"
        )
    manifest = store.read_manifest(folder / FOLDER, _KIND, Description)
    description = manifest["metadata"]
    if k is not None and k > description["k"]:
        raise ValueError(
            f"{folder} has a shared basis of {description['k']} directions, expected at least {k}: use fewer, or move "
            f"{folder / FOLDER} away and make one with `lorafusion convert --basis {k} --out {folder}`"
        )
    return description


def read_basis(
    folder: Path, k: int | None, *, made_of: Mapping[str, str], config: Architecture
) -> SharedBasis:
    """Load the first k directions of a pool's basis, by default all; ValueError if it is of another base or pool.

    `made_of` is the SHA-256 of the pool's adapters by name.
    """
    description = describe_basis(folder, k)
    if description["modules"] != made_of:
        raise ValueError(
            f"{folder / FOLDER} is the basis of other adapters than those of {folder}. "
            f"Move it away, and make one with `lorafusion convert --basis {description['k']} --out {folder}`"
        )
    tree, _ = store.load(folder / FOLDER, _KIND, Description)
    _check_shapes(folder / FOLDER, tree, description, config)
    fields: dict[str, Any] = {
        field: jax.tree.map(jnp.asarray, tree[field]) for field in _FIELDS
    }
    basis = SharedBasis(
        **fields,
        rank={
            site: jnp.asarray(rank, jnp.int32)
            for site, rank in description["rank"].items()
        },
        names=tuple(description["modules"]),
        sites=tuple(site for site in config.sites if site in description["rank"]),
    )
    return basis if k is None else basis.first(k)


def _check_shapes(
    folder: Path,
    tree: Mapping[str, Any],
    description: Description,
    config: Architecture,
) -> None:
    """Raise a FileError if the arrays of a basis are not those of its description, or are of another base."""
    k = description["k"]
    modules = len(description["modules"])
    expected = {}
    for name, rank in description["rank"].items():
        site = config.sites.get(name)
        if site is None or [len(row) for row in rank] != [modules] * site.layers:
            got = f"ranks of {len(rank)} layers"
            needed = "those of each of its modules in every layer of its base"
            raise FileError(folder, field=name, got=got, expected=needed, fix=RESTORE)
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
    store.check_signature(folder, store.signature(tree), expected, fix=RESTORE)
