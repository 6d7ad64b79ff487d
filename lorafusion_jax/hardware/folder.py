"""Chips: a configuration, the weights that are in arrays, and the key that the chips are drawn from.

A chip is drawn when it is used, from its weights, its configuration, its key and its age. A folder of chips records
them, with digests of the weights, and the programmed arrays, which a drawn chip is compared with:

    CHIPS/manifest.json   key, digital weights, digests of base and modules, arrays and cost of writing them
    CHIPS/config.yaml     configuration of the crossbar
    CHIPS/chip_0/         SITE.safetensors, ...: a file for each stack of matrices (`crossbar.load_chip`)

A folder of preparations (`prepare`) stands for a configuration too.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from .. import crossbar
from ..loading.identity import digests
from ..loading.model import LoadedModel
from ..models.architecture import matrices
from ..models.weights import dense
from ..support.checks import check_uint32
from ..support.reading import FileError, read_json
from .prepared import CONFIG, PREPARATIONS, Prepared, load_prepared

MANIFEST = "manifest.json"
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


class Manifest(TypedDict):
    """Contents of `manifest.json` in a folder of chips. Digests are those of runs (`io.digests`)."""

    base: str
    base_sha256: str
    pool: str | None
    modules: dict[str, str]  # name -> SHA-256
    basis_sha256: str | None
    config: str
    config_sha256: str
    digital: list[str]
    key: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    chips: Annotated[int, msgspec.Meta(ge=1)]
    one_chip: OneChip
    versions: NotRequired[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Chips:
    """Source of chips.

    Attributes:
      config: configuration of the crossbar.
      digital: patterns of weights that stay digital.
      key: PRNG key; chip n has fold_in(key, n).
      manifest: manifest of the folder; None without a folder, so that any number of chips can be drawn.
      name: given name.
      prepared: preparations of a base; None without.
    """

    config: crossbar.CrossbarConfig
    digital: tuple[str, ...]
    key: Array
    manifest: Manifest | None
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
        return None if self.manifest is None else self.manifest["chips"]

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
          ValueError: the folder has no such chip.
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

        Raises ValueError if the base, the modules or the chips that the key draws differ from those in the folder.
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
        if self.manifest is not None:
            self._check(fused, self.manifest, control)
        return fused

    def _check(self, fused: LoadedModel, manifest: Manifest, control: str) -> None:
        if control != "none":
            raise ValueError(
                f"{self.name} holds no {control} control: give a preset or a file with --crossbar"
            )
        current = digests(fused)
        on_chips = manifest["modules"]
        if current["base"] != manifest["base_sha256"]:
            raise ValueError(
                f"{self.name} holds another base model (sha256 {manifest['base_sha256'][:12]}, the run's is "
                f"{current['base'][:12]}): program chips with the run's base, or evaluate a run on theirs"
            )
        pairs = {
            f"module {name}": (digest, on_chips.get(name))
            for name, digest in current["modules"].items()
        }
        if basis := current.get("basis"):
            pairs = {"shared basis": (basis, manifest["basis_sha256"])}
        for name, (digest, stored_digest) in pairs.items():
            if digest != stored_digest:
                if stored_digest is None:
                    state = "is not there"
                else:
                    state = f"has the sha256 {stored_digest[:12]}"
                raise ValueError(
                    f"the run fuses the {name} (sha256 {digest[:12]}), which on {self.name} {state}: the chips were "
                    "programmed with another pool; program them with the run's"
                )
        self._check_drawn(fused)

    def _check_drawn(self, fused: LoadedModel) -> None:
        """Draw one weight of chip 0 again, and compare it with the written arrays.

        They may differ by the rounding of the dtype that the run loads weights in.
        """
        folder = Path(self.name) / "chip_0"
        base = matrices(nnx.merge(fused.problem.graph, fused.problem.frozen.base))
        site = next(
            (site for site in base if (folder / f"{site}.safetensors").is_file()), None
        )
        if site is None:
            return
        weight = {site: dense(base[site], jnp.float32)}
        site_preparations = (
            {site: self.prepared.of_sites[site]} if self.prepared else None
        )
        redrawn = crossbar.program_tree(
            weight,
            {site: self.config},
            self.chip_key(0),
            preparations=site_preparations,
        )[site]
        stored_weights = crossbar.programmed_weights(
            crossbar.load_chip(folder / f"{site}.safetensors", self.config)
        )
        redrawn_weights = crossbar.programmed_weights(redrawn)[: len(stored_weights)]
        if not np.allclose(
            redrawn_weights,
            stored_weights,
            rtol=0,
            atol=1e-2 * float(np.abs(stored_weights).max()),
        ):
            raise ValueError(
                f"{folder / site}.safetensors holds other arrays than the key draws now: another version of this "
                "package or of JAX wrote them, or the run loads its weights in fewer bits. Program chips again"
            )


def load_chips(name: str, *, key: int = 0, digital: tuple[str, ...] = ()) -> Chips:
    """Return the chips of a folder that `lorafusion crossbar program` wrote, or of a configuration.

    Args:
      name: folder of chips or of preparations, preset, or .yaml or .json file.
      key: key of the chips of a configuration; a folder has its own.
      digital: digital weights of a configuration; a folder has its own.
    """
    check_uint32(chip_key=key)
    folder = Path(name)
    prepared = load_prepared(folder) if (folder / PREPARATIONS).is_dir() else None
    if not (folder / MANIFEST).is_file():
        if prepared is not None:
            digital = (*digital, *prepared.digital)
            return Chips(
                prepared.config, digital, jax.random.key(key), None, name, prepared
            )
        if folder.is_dir():
            raise ValueError(
                f"{folder} has no {MANIFEST}: give a folder that `lorafusion crossbar program` or `prepare` wrote"
            )
        return Chips(
            crossbar.load_config(name), digital, jax.random.key(key), None, name
        )
    manifest = read_json(folder / MANIFEST, Manifest, "a folder of chips")
    if digital or key:
        raise ValueError(
            f"{folder} has its own key and digital weights: leave out these options"
        )
    config = crossbar.load_config(folder / CONFIG)
    if crossbar.config_hash(config) != manifest["config_sha256"]:
        raise FileError(
            folder / CONFIG,
            got="not the configuration that the chips were programmed with",
            fix="restore it",
        )
    return Chips(
        config,
        tuple(manifest["digital"]),
        jax.random.key(manifest["key"]),
        manifest,
        name,
        prepared,
    )


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
    over_time = (
        len(getattr(device.programming, "seconds", ())) > 1
    )  # measured at several times
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
