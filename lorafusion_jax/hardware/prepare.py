"""`lorafusion crossbar prepare`: changes of a base's matrices from text, so that any chip loses less.

FOLDER/config.yaml                         configuration of the crossbar
FOLDER/preparations/manifest.json          digests of the base and the text, tokens, expected errors
FOLDER/preparations/arrays.safetensors     SITE/factors, SITE/ranges
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from .. import crossbar
from ..crossbar.preparation.preparation import check_preparation
from ..crossbar.preparation.transform import transform_matrices
from ..io import store
from ..loading.model import LoadedModel, digests
from ..models.architecture import matrices, sharing_inputs
from ..models.weights import dense
from ..support.checks import at_least, check_uint32
from ..support.options import (
    BaseOptions,
    CrossbarOptions,
    DigitalOptions,
    OutOptions,
    SeedOptions,
)
from ..support.progress import progress
from ..support.reading import FileError, error_context
from ..support.writing import new_folder
from .program import program
from .texts import (
    WINDOW,
    load_base,
    logits_of_base,
    no_padding,
    read_batches,
    read_texts,
    token_ids,
)

_CONFIG = "config.yaml"
PREPARATIONS = "preparations"

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions(
    DigitalOptions, SeedOptions, OutOptions, CrossbarOptions, BaseOptions
):
    """Prepare a base model so that it loses little on any chip of a configuration, and write the preparations.

    Input factors, an orthogonal transform and ranges of columns change its matrices, but not their products. Text shows
    which inputs matter; no chip is needed. All commands take the folder with --crossbar.

    Examples:
      lorafusion crossbar prepare --base base --crossbar noisy.yaml --text page.txt --out prepared
      lorafusion evaluate --run runs/task --crossbar prepared --chips 8

    Attributes:
      crossbar: a preset, or a .yaml or .json file; all changes are made if its `mapping` has none of clip, factors
        and transform.
      seed: seed of the transform's signs.
      text: text files; a causal model reads windows of 128 tokens, another one each line.
      tokens: tokens of the text that a causal model reads.
    """

    text: tuple[Path, ...]
    tokens: int = 3072


def prepare(options: PrepareOptions) -> PreparedManifest:
    """Write a folder of preparations, and return its metadata.

    Raises:
      ValueError: before anything is written: the folder exists, the configuration scales no columns or cannot be
        prepared for, a pattern matches no weight, matrices have a width without a transform, or the text is too short.
    """
    if options.out.exists():
        raise ValueError(
            f"{options.out} exists: give another --out; preparations are never overwritten"
        )
    at_least(1, tokens=options.tokens, text=len(options.text))
    check_uint32(seed=options.seed)
    config = crossbar.load_config(options.crossbar)
    scale = config.mapping.scale
    if scale != "column" and not crossbar.needs_preparation(config):
        raise ValueError(
            f"{options.crossbar} has mapping.scale = {scale!r}: ranges are chosen for columns; set it to column"
        )
    config = with_changes(config)
    content = read_texts(options.text)
    loaded = load_base(options.base)
    graph = loaded.problem.graph
    frozen = loaded.problem.frozen
    digital = options.keep_digital
    weights = weights_in_arrays(loaded, digital)
    for name, weight in weights.items() if config.mapping.transform != "none" else ():
        with error_context(name):
            transform_matrices(weight.shape[-2])  # refuses a width that has none
    batches = read_batches(loaded, content, options.tokens)
    if not batches:
        if not loaded.config.causal:
            raise ValueError("the text has 0 lines: give at least one")
        ids = token_ids(loaded, content)[: options.tokens]
        raise ValueError(
            f"the text has {len(ids)} tokens: give at least a window of {WINDOW}, better {PrepareOptions.tokens:,}"
        )
    rules = dict.fromkeys(digital) | {"*": crossbar.PRESETS["ideal"]}
    perfect = program(graph, frozen, rules, jax.random.key(0)).base
    run = logits_of_base(graph)
    moments = crossbar.moments(
        run, perfect, progress("text", batches), counted=no_padding(loaded)
    )
    errors = crossbar.code_errors(config)
    preparations = dict[str, crossbar.Preparation]()
    sites: dict[str, OneSite] = {}
    groups = sharing_inputs(loaded.config.sites, weights)
    for names in progress("groups of sites", groups):
        squares = moments[names[0]]
        preparations |= crossbar.prepare(
            {n: weights[n] for n in names},
            squares,
            config,
            seed=options.seed,
            errors=errors,
        )
        for name in names:
            preparation = preparations[name]
            error_powers = [
                np.atleast_1d(
                    crossbar.expected_error(
                        weights[name], squares, config, prepared, errors=errors
                    )
                ).tolist()
                for prepared in (crossbar.Preparation(), preparation)
            ]
            sites[name] = OneSite(
                transforms=preparation.transforms,
                identity=preparation.identity,
                before=error_powers[0],
                after=error_powers[1],
            )
    manifest = PreparedManifest(
        base=options.base,
        base_sha256=digests(loaded)["base"],
        config_sha256=crossbar.config_hash(config),
        text_sha256=hashlib.sha256(content.encode()).hexdigest(),
        tokens=sum(batch.labels.size for batch in batches),
        seed=options.seed,
        digital=list(digital),
        sites=sites,
    )
    tree = {
        name: {
            part: np.asarray(getattr(preparation, part))
            for part in ("factors", "ranges")
            if getattr(preparation, part) is not None
        }
        for name, preparation in preparations.items()
    }
    with new_folder(options.out) as partial:
        crossbar.save_config(config, partial / _CONFIG)
        store.save(partial / PREPARATIONS, _KIND, tree, manifest)
    return manifest


def load_prepared(folder: Path) -> Prepared:
    """Return the preparations of a folder; raises a FileError if it is damaged, or has another configuration now."""
    tree, manifest = store.load(folder / PREPARATIONS, _KIND, PreparedManifest)
    again = "restore it, or run `lorafusion crossbar prepare` again with another --out"
    config = crossbar.load_config(folder / _CONFIG)
    if crossbar.config_hash(config) != manifest["config_sha256"]:
        raise FileError(
            folder / _CONFIG,
            got="not the configuration that the base was prepared for",
            fix=again,
        )
    preparations = {}
    for name, entry in manifest["sites"].items():
        site_arrays = {}
        if isinstance(tree.get(name), dict):
            site_arrays = {
                part: jnp.asarray(values)
                for part, values in tree[name].items()
                if isinstance(values, np.ndarray)
            }
        preparation = crossbar.Preparation(
            factors=site_arrays.get("factors"),
            ranges=site_arrays.get("ranges"),
            transforms=entry["transforms"],
        ).identified()
        if preparation.identity != entry["identity"]:
            raise FileError(
                folder / PREPARATIONS,
                field=repr(name),
                got="arrays with another identity",
                fix=again,
            )
        preparations[name] = preparation
    return Prepared(
        preparations,
        manifest["base_sha256"],
        str(folder),
        config,
        tuple(manifest["digital"]),
    )


def with_changes(config: crossbar.CrossbarConfig) -> crossbar.CrossbarConfig:
    """Return the configuration with all changes, unless it has some."""
    if crossbar.needs_preparation(config):
        return config
    mapping = dataclasses.replace(
        config.mapping,
        scale="column",
        factors=True,
        transform="hadamard",
        clip="optimal",
    )
    return dataclasses.replace(config, mapping=mapping)


def weights_in_arrays(
    loaded: LoadedModel, digital: Sequence[str]
) -> dict[str, Float[Array, "*N d_in d_out"]]:
    """Return the base's matrices that no pattern keeps digital, by name; ValueError if there are none."""
    base = matrices(nnx.merge(loaded.problem.graph, loaded.problem.frozen.base))
    weights = {
        name: dense(weight, jnp.float32)
        for name, weight in base.items()
        if not any(fnmatchcase(name, pattern) for pattern in digital)
    }
    if not weights:
        raise ValueError(
            f"the digital weights {', '.join(digital)} leave none for arrays: name fewer"
        )
    return weights
