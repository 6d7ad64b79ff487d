"""Chips: a configuration, the weights that are in arrays, and the key that the chips are drawn from.

A chip is drawn when it is used, from its weights, its configuration, its key and its age. `lorafusion crossbar program`
writes a JSON file that records them, with digests of the weights and of the cells of chip 0, which are drawn again and
compared. A folder of preparations (`prepare`) stands for a configuration too.
"""

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from .. import crossbar
from ..crossbar.config.files import config_fields, config_from
from ..io.pool import open_pool
from ..loading.model import LoadedModel, digests, load_model
from ..loading.spec import LoadOptions
from ..methods.fusion import FusionRecipe
from ..models.architecture import matrices
from ..models.weights import dense
from ..support.checks import at_least, check_uint32
from ..support.options import (
    BasisOptions,
    DrawnChipsOptions,
    OutOptions,
    PoolOptions,
    PresetOptions,
)
from ..support.reading import FileError, error_context, read_json
from ..support.version import __version__
from ..support.writing import check_writable, write_json
from .prepare import PREPARATIONS, Prepared, load_prepared
from .program import program

# Number from which the keys of training steps are made; all chips have smaller numbers.
STEP_CHIPS = 2**32 - 1

Loaded = TypeVar("Loaded", bound=LoadedModel)
_UNITS = {
    "s": 1,
    "min": 60,
    "h": 3600,
    "day": 86_400,
    "month": 30 * 86_400,
    "year": 365 * 86_400,
}


class OneChip(TypedDict):
    """Arrays of one chip and the cost of writing them; ranges are low, typical and high."""

    arrays: int
    cells: int
    utilisation: float
    pulses: list[float]
    joules: list[float]
    seconds: list[float]
    simulated_pulses: float | None


class ChipFile(TypedDict):
    """Contents of a file of chips. Digests of weights are those of runs (`loading.model`).

    Attributes:
      modules: digest of each module of the pool, by its name.
      crossbar: name that the configuration was given by, and `config` its fields.
      prepared: folder of the base's preparations, relative to that of the file; None without.
      sha256: digest of the configuration and the preparations.
      cells_sha256: digest of the programmed cells of chip 0, by the names of its matrices.
      versions: versions of this package and of JAX that wrote the file.
    """

    base: str
    base_sha256: str
    pool: str
    modules: dict[str, str]
    basis_sha256: str | None
    crossbar: str
    config: dict[str, Any]
    prepared: str | None
    sha256: str
    digital: list[str]
    key: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
    chips: Annotated[int, msgspec.Meta(ge=1)]
    one_chip: OneChip
    cells_sha256: dict[str, str]
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Chips:
    """Source of chips.

    Attributes:
      config: configuration of the crossbar.
      digital: patterns of weights that stay digital.
      key: PRNG key; chip n has fold_in(key, n).
      file: content of a file of chips; None without, so that any number of chips can be drawn.
      name: given name.
      prepared: preparations of a base; None without.
    """

    config: crossbar.CrossbarConfig
    digital: tuple[str, ...]
    key: Array
    file: ChipFile | None
    name: str
    prepared: Prepared | None = None

    def __post_init__(self):
        if "*" in self.digital:
            raise ValueError(
                "the digital weights '*' leave none for arrays: name fewer"
            )

    @property
    def count(self) -> int | None:
        """Number of chips; None for any number."""
        return None if self.file is None else self.file["chips"]

    @property
    def sha256(self) -> str:
        """Digest of the configuration and its preparations."""
        digest = crossbar.config_hash(self.config)
        if self.prepared is None:
            return digest
        identities = "".join(
            preparation.identity for preparation in self.prepared.of_sites.values()
        )
        return hashlib.sha256(f"{digest}{identities}".encode()).hexdigest()

    def rules(self, config: crossbar.CrossbarConfig | None = None) -> crossbar.Rules:
        """Return the configuration of every weight, by default that of these chips; None for digital weights."""
        return dict.fromkeys(self.digital) | {"*": config or self.config}

    def chip_key(self, number: int) -> Key[Array, ""]:
        """Return the key of a chip.

        Raises:
          ValueError: the file has no such chip.
        """
        if self.count is not None and not 0 <= number < self.count:
            raise ValueError(
                f"{self.name} has no chip {number}: it has 0 to {self.count - 1}: choose one"
            )
        if not 0 <= number < STEP_CHIPS:
            raise ValueError(
                f"there is no chip {number}: chips are numbered from 0 to {STEP_CHIPS - 1:,}: choose one"
            )
        return jax.random.fold_in(self.key, number)

    def checked(self, fused: Loaded, control: str = "none") -> Loaded:
        """Return the model with the preparations of its base.

        Raises ValueError if the base, the modules or the chips that the key draws differ from those of the file.
        """
        frozen = fused.problem.frozen
        if self.prepared is not None:
            base = matrices(nnx.merge(fused.problem.graph, frozen.base))
            self.prepared.check(
                digests(fused)["base"],
                {name: weight.shape for name, weight in base.items()},
            )
            fused = fused.with_problem(
                frozen=dataclasses.replace(frozen, preparations=self.prepared.of_sites)
            )
        elif frozen.preparations is None and crossbar.needs_preparation(self.config):
            raise ValueError(
                f"{self.name} has mapping.factors, transform or clip, which depend on the base and its inputs: run "
                f"`lorafusion crossbar prepare --crossbar {self.name}` with text, and give its folder instead"
            )
        if self.file is not None:
            if control != "none":
                raise ValueError(
                    f"{self.name} holds no {control} control: give a preset or a file with --crossbar"
                )
            current = digests(fused)
            if current["base"] != self.file["base_sha256"]:
                raise ValueError(
                    f"{self.name} holds another base model (sha256 {self.file['base_sha256'][:12]}, the run's is "
                    f"{current['base'][:12]}): program chips with the run's base, or evaluate a run on theirs"
                )
            pairs = {
                f"module {name}": (digest, self.file["modules"].get(name))
                for name, digest in current["modules"].items()
            }
            if basis := current.get("basis"):
                pairs = {"shared basis": (basis, self.file["basis_sha256"])}
            for name, (digest, stored_digest) in pairs.items():
                if digest != stored_digest:
                    raise ValueError(
                        f"the run fuses the {name} (sha256 {digest[:12]}), and {self.name} has another one or none: "
                        "the chips were programmed with another pool; program them with the run's"
                    )
            self._check_cells(fused, self.file)
        return fused

    def _check_cells(self, fused: LoadedModel, file: ChipFile) -> None:
        """Draw a matrix of chip 0 again, and compare its digest."""
        base = matrices(nnx.merge(fused.problem.graph, fused.problem.frozen.base))
        site = next((site for site in base if site in file["cells_sha256"]), None)
        if site is None:
            return
        preparations = {} if self.prepared is None else self.prepared.of_sites
        chip = crossbar.program_tree(
            {site: dense(base[site], jnp.float32)},
            {site: self.config},
            self.chip_key(0),
            preparations={site: preparations[site]} if preparations else None,
        )[site]
        if cells_sha256(chip) != file["cells_sha256"][site]:
            written_by = " and ".join(
                f"{name} {version}" for name, version in file["versions"].items()
            )
            raise ValueError(
                f"{self.name} was written by {written_by}, and its key draws other cells of {site} here (with "
                f"lorafusion-jax {__version__} and jax {jax.__version__}): program chips again with these versions, on "
                "this kind of processor, and let runs load the base in its own dtype"
            )


def cells_sha256(chip: crossbar.Chip) -> str:
    """Return a digest of the weights as programmed, which follow from the cells."""
    return hashlib.sha256(np.asarray(chip.codes).tobytes()).hexdigest()


def load_chips(name: str, *, key: int = 0, digital: tuple[str, ...] = ()) -> Chips:
    """Return the chips of a file that `lorafusion crossbar program` wrote, or of a configuration.

    Args:
      name: file of chips, folder of preparations, preset, or .yaml or .json file of a configuration.
      key: key of the chips of a configuration; a file of chips has its own.
      digital: digital weights of a configuration; a file of chips has its own.
    """
    check_uint32(chip_key=key)
    path = Path(name)
    file = None
    prepared = None
    if path.is_dir():
        if not (path / PREPARATIONS).is_dir():
            raise ValueError(
                f"{path} has no {PREPARATIONS}: give a folder that `lorafusion crossbar prepare` wrote, or a file"
            )
        prepared = load_prepared(path)
        config = prepared.config
        digital = (*digital, *prepared.digital)
    elif (
        path.suffix not in (".yaml", ".yml")
        and path.exists()
        and b'"cells_sha256"' in path.read_bytes()
    ):
        file = read_json(path, ChipFile, "a file of chips")
        if digital or key:
            raise ValueError(
                f"{path} has its own key and digital weights: leave out these options"
            )
        with error_context(path):
            config = config_from(file["config"])
        if file["prepared"] is not None:
            prepared = load_prepared(path.parent / file["prepared"])
        digital = tuple(file["digital"])
        key = file["key"]
    else:
        config = crossbar.load_config(name)
    chips = Chips(config, digital, jax.random.key(key), file, name, prepared)
    if file is not None and chips.sha256 != file["sha256"]:
        raise FileError(
            path,
            got="not the configuration or the preparations that the chips were programmed with",
            fix="restore them",
        )
    return chips


def seconds(age: str) -> float:
    """Return an age such as 0, 3600, 1s, 1h, 1day, 1month or 1year in seconds."""
    number = age.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = age[len(number) :].removesuffix("s") or "s"
    try:
        age_in_seconds = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        raise ValueError(
            f"an age of {age!r}: give seconds, or a number with one of {', '.join(_UNITS)}"
        ) from None
    if not 0 <= age_in_seconds < float("inf"):
        raise ValueError(f"an age of {age!r}: give a finite age of 0 or more")
    return age_in_seconds


def aged(
    config: crossbar.CrossbarConfig, age: str | None, *, compensate: bool | None = None
) -> crossbar.CrossbarConfig:
    """Return the configuration of chips at an age since programming, which is an array, so ages share a program.

    `compensate` undoes the mean drift digitally. None stands for the configuration's own age and compensation.

    Raises:
      ValueError: nothing in the configuration depends on time.
    """
    device = config.device
    # Measured at several times.
    over_time = len(getattr(device.programming, "seconds", ())) > 1
    needs = "--compensate" if compensate else None
    if age is not None and seconds(age):
        needs = f"an age of {age}"
    if needs is not None and device.drift is None and not over_time:
        raise ValueError(
            f"{needs}, but these cells have no drift model: give device.drift, such as "
            "{model: PowerLaw, exponent: 0.01} or RERAM_CMO_DRIFT, in the configuration"
        )
    if age is not None:
        device = dataclasses.replace(device, time=jnp.float32(seconds(age)))
    if compensate is not None:
        device = dataclasses.replace(device, compensate=compensate)
    return dataclasses.replace(config, device=device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramOptions(
    BasisOptions, DrawnChipsOptions, PresetOptions, OutOptions, PoolOptions
):
    """Program a base model and a pool onto independent chips, and report arrays, cells, energy and time.

    Every chip has its own random errors, which are drawn from the key. `lorafusion fuse` and `lorafusion evaluate`
    take the file with --crossbar, and draw its chips again.

    Examples:
      lorafusion crossbar program --base base --pool pool --crossbar noisy.yaml --chips 8 --out noisy_chips.json
      lorafusion crossbar program --base base --pool pool --basis 32 --crossbar noisy.yaml --out basis_chips.json

    Attributes:
      pool: a converted pool, or a folder of PEFT adapter folders; all its modules are written.
      out: JSON file to write, which must not exist.
      crossbar: a preset (ideal, isaac, puma, raella, neurram, aihwkit, crosssim), a .yaml or .json file, or a folder
        that `lorafusion crossbar prepare` wrote.
      basis: write the first so many directions of the pool's shared basis instead of its modules.
      chips: number of chips.
    """

    chips: int = 1


def write_chips(options: ProgramOptions) -> ChipFile:
    """Write the file, and return its content.

    Raises:
      ValueError: before anything is written: the file exists, or a configuration, a pattern, a base or a pool
        cannot be used.
    """
    if options.out.exists():  # before a model is programmed
        raise ValueError(
            f"{options.out} exists: give another --out; chips are never overwritten"
        )
    at_least(1, chips=options.chips, basis=options.basis)
    chips = load_chips(
        options.crossbar, key=options.chip_key, digital=options.keep_digital
    )
    if options.chips > 1 and not crossbar.is_random(chips.config):
        raise ValueError(
            f"programming is not random in {options.crossbar}, so {options.chips} chips are alike: use 1"
        )
    names = open_pool(options.pool).names
    recipe = FusionRecipe(modules=len(names), basis=options.basis)
    fused = chips.checked(
        load_model(
            LoadOptions(
                base=options.base, pool=options.pool, adapters=names, recipe=recipe
            )
        )
    )
    check_writable(options.out)
    first_chip = program(
        fused.problem.graph,
        fused.problem.frozen,
        chips.rules(),
        chips.chip_key(0),
        norm="ideal",
    )
    programmed = crossbar.chips_in(first_chip)
    weight_digests = digests(fused)
    prepared = None
    if chips.prepared is not None:
        prepared = os.path.relpath(options.crossbar, options.out.parent)
    content: ChipFile = {
        "base": options.base,
        "base_sha256": weight_digests["base"],
        "pool": options.pool,
        "modules": weight_digests["modules"],
        "basis_sha256": weight_digests.get("basis"),
        "crossbar": options.crossbar,
        "config": config_fields(chips.config),
        "prepared": prepared,
        "sha256": chips.sha256,
        "digital": list(chips.digital),
        "key": options.chip_key,
        "chips": options.chips,
        "one_chip": _report(programmed),
        "cells_sha256": {chip.name: cells_sha256(chip) for chip in programmed},
        "versions": {"lorafusion-jax": __version__, "jax": jax.__version__},
    }
    write_json(options.out, content)
    return content


def _report(leaves: list[crossbar.Chip]) -> OneChip:
    total = crossbar.Counts()
    cells_in_arrays = 0
    used = 0.0
    pulses = None
    for leaf in leaves:
        matrices = math.prod(leaf.shape[:-2])
        matrix_counts = crossbar.counts(leaf.matrix_shape, leaf.config) * matrices
        total += matrix_counts
        explained = crossbar.explain(leaf)
        cells = explained.arrays * math.prod(explained.array) * matrices
        cells_in_arrays += cells
        used += explained.utilisation * cells
        if leaf.pulses is not None:
            pulses = (pulses or 0) + float(leaf.pulses.mean()) * matrix_counts.cells
    cost = crossbar.write_cost(total)
    return {
        "arrays": total.arrays,
        "cells": total.cells,
        "utilisation": used / cells_in_arrays,
        "pulses": list(dataclasses.astuple(cost.pulses)),
        "joules": list(dataclasses.astuple(cost.energy)),
        "seconds": list(dataclasses.astuple(cost.time)),
        "simulated_pulses": pulses and pulses / total.cells,
    }
