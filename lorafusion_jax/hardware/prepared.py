"""Preparations of a base model on disk (see `prepare`).

FOLDER/config.yaml                         configuration of the crossbar
FOLDER/preparations/manifest.json          digests of the base and the text, tokens, expected errors
FOLDER/preparations/arrays.safetensors     SITE/factors, SITE/ranges
"""

import dataclasses
from pathlib import Path
from typing import TypedDict

import jax.numpy as jnp
import numpy as np

from .. import crossbar
from ..io import arrays
from ..io.folders import new_folder
from ..support.reading import FileError
from ..support.text import shown

CONFIG, PREPARATIONS = "config.yaml", "preparations"
_PARTS = ("factors", "ranges")


class OneSite(TypedDict):
    """Preparation of a site; errors are the expected power over that of the outputs, a number for each layer.

    Attributes:
      transforms: inputs are transformed.
      identity: digest of its arrays.
      before: relative error power of the largest weights as ranges, without a preparation.
      after: the same with the preparation.
    """

    transforms: bool
    identity: str
    before: list[float]
    after: list[float]


class PreparedManifest(TypedDict):
    """Metadata of a folder of preparations."""

    base: str
    base_sha256: str
    config_sha256: str
    text_sha256: str
    tokens: int
    seed: int
    sites: dict[str, OneSite]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Preparations of a base by the names of its matrices, from a folder."""

    of_sites: dict[str, crossbar.Preparation]
    base_sha256: str
    folder: str

    def check(self, base_sha256: str) -> None:
        """Raise a ValueError for another base."""
        if base_sha256 != self.base_sha256:
            raise ValueError(
                f"{self.folder} prepares another base model (sha256 {self.base_sha256[:12]}, this one is "
                f"{base_sha256[:12]}): run `lorafusion crossbar prepare` with this base"
            )


def save_prepared(
    folder: Path, config: crossbar.CrossbarConfig, of_sites: dict[str, crossbar.Preparation], manifest: PreparedManifest
) -> None:
    """Write a folder of preparations, which must not exist."""
    tree = {
        name: {part: np.asarray(values) for part in _PARTS if (values := getattr(one, part)) is not None}
        for name, one in of_sites.items()
    }
    with new_folder(folder) as partial:
        crossbar.save_config(config, partial / CONFIG)
        arrays.save(partial / PREPARATIONS, tree, manifest)


def load_prepared(folder: Path) -> Prepared:
    """Return the preparations of a folder; raises a FileError if it is damaged, or has another configuration now."""
    tree, manifest = arrays.load(folder / PREPARATIONS, metadata=PreparedManifest, what="a folder of preparations")
    again = "restore it, or run `lorafusion crossbar prepare` again with another --out"
    if crossbar.config_hash(crossbar.load_config(folder / CONFIG)) != manifest["config_sha256"]:
        raise FileError(folder / CONFIG, got="not the configuration that the base was prepared for", fix=again)
    found = {}
    for name, of_site in manifest["sites"].items():
        arrays_of_site = tree.get(name, {})
        if not isinstance(arrays_of_site, dict) or not set(arrays_of_site) <= {*_PARTS}:
            got, expected = "other arrays", ", ".join(_PARTS)
            raise FileError(folder / PREPARATIONS, field=shown(name), got=got, expected=expected, fix=again)
        parts = {part: jnp.asarray(values) for part, values in arrays_of_site.items()}
        found[name] = crossbar.Preparation(**parts, transforms=of_site["transforms"], identity=of_site["identity"])
    return Prepared(found, manifest["base_sha256"], str(folder))
