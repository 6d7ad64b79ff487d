"""Preparations of a base model on disk (see `prepare`).

FOLDER/config.yaml                         configuration of the crossbar
FOLDER/preparations/manifest.json          digests of the base and the text, tokens, expected errors
FOLDER/preparations/arrays.safetensors     SITE/factors, SITE/ranges
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import jax.numpy as jnp
import numpy as np

from .. import crossbar
from ..crossbar.preparation.preparation import check_preparation
from ..io import store
from ..io.folders import new_folder
from ..support.reading import FileError, error_context

CONFIG = "config.yaml"
PREPARATIONS = "preparations"
_PARTS = ("factors", "ranges")
_KIND = "preparation"


class OneSite(TypedDict):
    """Preparation of a site; errors are the expected power over that of the outputs, a number for each layer.

    Attributes:
      transforms: inputs are transformed.
      identity: digests of its arrays.
      before: relative error power of the largest weights as ranges, without a preparation.
      after: the same with the preparation.
    """

    transforms: bool
    identity: str
    before: list[float]
    after: list[float]


class PreparedManifest(TypedDict):
    """Metadata of a folder of preparations; `digital` are patterns of weights that have none."""

    base: str
    base_sha256: str
    config_sha256: str
    text_sha256: str
    tokens: int
    seed: int
    digital: list[str]
    sites: dict[str, OneSite]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Preparations of a base by the names of its matrices, and patterns of those that stay digital, from a folder."""

    of_sites: dict[str, crossbar.Preparation]
    base_sha256: str
    folder: str
    config: crossbar.CrossbarConfig
    digital: tuple[str, ...]

    def check(self, base_sha256: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise a ValueError for another base, or for arrays that do not fit its matrices, given their shapes."""
        if base_sha256 != self.base_sha256:
            raise ValueError(
                f"{self.folder} prepares another base model (sha256 {self.base_sha256[:12]}, this one is "
                f"{base_sha256[:12]}): run `lorafusion crossbar prepare` with this base"
            )
        for name, preparation in self.of_sites.items():
            with error_context(f"{self.folder}: {name!r}"):
                if name not in shapes:
                    raise ValueError(
                        f"no matrix of the base: expected some of {', '.join(shapes)}"
                    )
                check_preparation(preparation, shapes[name], self.config)


def save_prepared(
    folder: Path,
    config: crossbar.CrossbarConfig,
    preparations: dict[str, crossbar.Preparation],
    manifest: PreparedManifest,
) -> None:
    """Write a folder of preparations, which must not exist."""
    tree = {
        name: {
            part: np.asarray(values)
            for part in _PARTS
            if (values := getattr(preparation, part)) is not None
        }
        for name, preparation in preparations.items()
    }
    with new_folder(folder) as partial:
        crossbar.save_config(config, partial / CONFIG)
        store.save(partial / PREPARATIONS, _KIND, tree, manifest)


def load_prepared(folder: Path) -> Prepared:
    """Return the preparations of a folder; raises a FileError if it is damaged, or has another configuration now."""
    tree, manifest = store.load(folder / PREPARATIONS, _KIND, PreparedManifest)
    again = "restore it, or run `lorafusion crossbar prepare` again with another --out"
    config = crossbar.load_config(folder / CONFIG)
    if crossbar.config_hash(config) != manifest["config_sha256"]:
        raise FileError(
            folder / CONFIG,
            got="not the configuration that the base was prepared for",
            fix=again,
        )
    preparations = {}
    for name, entry in manifest["sites"].items():
        arrays_of_site = tree.get(name, {})
        if not isinstance(arrays_of_site, dict) or not set(arrays_of_site) <= {*_PARTS}:
            got = "other arrays"
            expected = ", ".join(_PARTS)
            raise FileError(
                folder / PREPARATIONS,
                field=repr(name),
                got=got,
                expected=expected,
                fix=again,
            )
        leads = {
            getattr(values, "shape", ())[:-1] for values in arrays_of_site.values()
        }
        for part, values in arrays_of_site.items():
            dtype = getattr(values, "dtype", "a folder")
            shape = getattr(values, "shape", ())
            if (
                dtype != np.float32
                or not shape
                or len(leads) > 1
                or not np.all(np.isfinite(values) & (values != 0))
            ):
                expected = "[L, d] of finite float32 numbers, none of them 0, with the L of the other array"
                got = f"{dtype}{list(shape)}"
                field = repr(f"{name}/{part}")
                raise FileError(
                    folder / PREPARATIONS,
                    field=field,
                    got=got,
                    expected=expected,
                    fix=again,
                )
        parts = {part: jnp.asarray(values) for part, values in arrays_of_site.items()}
        preparation = crossbar.Preparation(transforms=entry["transforms"])
        preparations[name] = dataclasses.replace(preparation, **parts).identified()
        if preparations[name].identity != entry["identity"]:
            raise FileError(
                folder / PREPARATIONS,
                field=repr(name),
                got="arrays with another identity",
                fix=again,
            )
    return Prepared(
        preparations,
        manifest["base_sha256"],
        str(folder),
        config,
        tuple(manifest["digital"]),
    )
