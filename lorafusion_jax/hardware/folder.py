"""Chips: a configuration, the weights that are in arrays, and the key that the chips are drawn from.

A chip is a function of its weights, its configuration and its key, at any age: it is drawn from them when it is used. A
folder of chips records these, with digests of the weights, and the arrays as they were programmed, which a chip that is
drawn is compared with:

    CHIPS/manifest.json   key, digital weights, digests of base and modules, arrays and what writing them took
    CHIPS/config.yaml     of the crossbar
    CHIPS/chip_0/         SITE.npz, ...: one file for each stack of matrices (`crossbar.load_chip`)
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from ..adapters.pool import LoraPool
from ..checks import check_uint32
from ..crossbar import (
    CrossbarConfig,
    Polynomial,
    Rules,
    has_hash,
    load_chip,
    load_config,
    program_tree,
    programmed_weights,
)
from ..files import FileError, read_json
from ..models.architecture import matrices
from ..models.weights import dense
from ..runs.prepare import LoadedModel

MANIFEST, CONFIG = "manifest.json", "config.yaml"
BASIS = "shared basis"  # its name among the modules of a manifest
# The chips of training steps are none of chip 0, 1, ...
STEP_CHIPS = 2**32 - 1

_UNITS = {"s": 1, "min": 60, "h": 3600, "day": 86_400, "month": 30 * 86_400, "year": 365 * 86_400}


class OneChip(TypedDict):
    """Arrays of one chip and what writing them took; ranges are low, typical and high."""

    arrays: int
    cells: int
    utilisation: float
    pulses: list[float]
    joules: list[float]
    seconds: list[float]
    simulated_pulses: float | None


class Manifest(TypedDict):
    """What `manifest.json` of a folder of chips holds."""

    base: str
    base_sha256: str
    pool: str | None
    modules: dict[str, str]  # name -> SHA-256
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
      name: name that was given.

    Raises:
      ValueError: all weights are digital.
    """

    config: CrossbarConfig
    digital: tuple[str, ...]
    key: Array
    manifest: Manifest | None
    name: str

    def __post_init__(self):
        if "*" in self.digital:
            raise ValueError("the digital weights '*' are all there are, and leave none for arrays: name fewer")

    @property
    def count(self) -> int | None:
        """Number of chips; None for any number."""
        return None if self.manifest is None else self.manifest["chips"]

    def rules(self, config: CrossbarConfig | None = None) -> Rules:
        """Return which weights sit in arrays, of this configuration or of another one."""
        return dict.fromkeys(self.digital) | {"*": config or self.config}

    def chip_key(self, number: int) -> Array:
        """Return the key of a chip.

        Raises:
          ValueError: the folder has no such chip.
        """
        if self.count is not None and not 0 <= number < self.count:
            raise ValueError(f"{self.name} has no chip {number}: it has 0 to {self.count - 1}")
        if not 0 <= number < STEP_CHIPS:
            raise ValueError(f"there is no chip {number}: chips are numbered from 0 to {STEP_CHIPS - 1:,}")
        return jax.random.fold_in(self.key, number)

    def numbers(self, modules: Sequence[str], pool: Sequence[str]) -> Int[Array, " P"]:
        """Return the numbers that modules have on the chips: places in the pool that was written, or in `pool`."""
        there = list(pool if self.manifest is None else self.manifest["modules"])
        return jnp.array([there.index(name) for name in modules], jnp.int32)

    def check(self, fused: LoadedModel) -> None:
        """Raise an error if the run's base or modules differ from those on the chips, or the key now draws other chips.

        Raises:
          ValueError: a weight differs; the message names the first one.
        """
        if self.manifest is None:
            return
        now = digests(fused)
        if now["base"] != self.manifest["base_sha256"]:
            raise ValueError(
                f"{self.name} holds another base model (sha256 {self.manifest['base_sha256'][:12]}, the run's is "
                f"{now['base'][:12]}): program chips with the run's base, or evaluate a run on theirs"
            )
        on_chips = self.manifest["modules"]
        for name, digest in now["modules"].items():
            if on_chips.get(name) != digest:
                there = f"sha256 {on_chips[name][:12]}" if name in on_chips else "which they do not hold"
                what = name if name == BASIS else f"module {name}"
                raise ValueError(
                    f"the run fuses the {what} (sha256 {digest[:12]}), on {self.name} {there}: the chips were "
                    "programmed with another pool; program them with the run's"
                )
        self._check_drawn(fused)

    def _check_drawn(self, fused: LoadedModel) -> None:
        """Draw one weight of chip 0 again, and compare it with the arrays as they were written."""
        folder = Path(self.name) / "chip_0"
        base = matrices(nnx.merge(fused.problem.graph, fused.problem.frozen.base))
        site = next((site for site in base if (folder / f"{site}.npz").is_file()), None)
        if site is None:
            return
        weight = {site: dense(base[site], jnp.float32)}
        drawn = program_tree(weight, {site: self.config}, self.chip_key(0))[site]
        written = programmed_weights(load_chip(folder / f"{site}.npz", self.config))
        now = programmed_weights(drawn)[: len(written)]
        if not np.allclose(now, written, rtol=1e-4, atol=1e-5 * float(np.abs(written).max())):
            raise ValueError(
                f"{folder / site}.npz holds other arrays than the key draws now: other versions of this package or of "
                "JAX wrote them; program chips again"
            )


def load_chips(name: str, *, key: int = 0, digital: tuple[str, ...] = ()) -> Chips:
    """Return the chips of a folder that `lorafusion crossbar program` wrote, or of a configuration.

    Args:
      name: the folder, a preset, or a .yaml or .json file.
      key: of chips of a configuration.
      digital: their digital weights; a folder has its own.

    Raises:
      ValueError: it is none of these; a folder whose key or digital weights are others than these; or a key that is
        not of 32 bits.
    """
    check_uint32(chip_key=key)
    folder = Path(name)
    if not (folder / MANIFEST).is_file():
        if folder.is_dir():
            raise ValueError(f"{folder} has no {MANIFEST}: give a folder that `lorafusion crossbar program` wrote")
        return Chips(load_config(name), digital, jax.random.key(key), None, name)
    manifest = read_json(folder / MANIFEST, Manifest, "a folder of chips")
    if digital or key:
        raise ValueError(f"{folder} says itself what its key and its digital weights are: leave out these options")
    config = load_config(folder / CONFIG)
    if not has_hash(config, manifest["config_sha256"]):
        raise FileError(
            folder / CONFIG, got="not the configuration that the chips were programmed under", fix="restore it"
        )
    return Chips(config, tuple(manifest["digital"]), jax.random.key(manifest["key"]), manifest, name)


def digests(fused: LoadedModel) -> dict[str, Any]:
    """Return the SHA-256 of the base model's matrices, and of every loaded module or the shared basis, as float32."""
    model = nnx.merge(fused.problem.graph, fused.problem.frozen.base)
    base = hashlib.sha256()
    for weight in matrices(model).values():
        base.update(np.asarray(dense(weight, jnp.float32)).tobytes())
    modules = {}
    if (pool := fused.problem.frozen.pool) is not None:
        whole = isinstance(pool, LoraPool)
        for n, name in enumerate(pool.names if whole else [BASIS]):
            of_module = hashlib.sha256()
            for factor in pool.factors.values():
                for site in sorted(factor):
                    weight = jax.tree.map(lambda a, n=n: a[:, n], factor[site]) if whole else factor[site]
                    of_module.update(np.asarray(dense(weight, jnp.float32)).tobytes())
            modules[name] = of_module.hexdigest()
    return {"base": base.hexdigest(), "modules": modules}


def seconds(age: str) -> float:
    """Return an age such as 0, 3600, 1s, 1h, 1day, 1month or 1year in seconds.

    Raises:
      ValueError: it is none.
    """
    number = age.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = age[len(number) :].removesuffix("s") or "s"
    try:
        found = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        raise ValueError(f"an age of {age!r}: give seconds, or a number with one of {', '.join(_UNITS)}") from None
    if not 0 <= found < float("inf"):
        raise ValueError(f"an age of {age!r}: wanted 0 or more, and finite")
    return found


def aged(config: CrossbarConfig, age: str | None, *, compensate: bool | None = None) -> CrossbarConfig:
    """Return the configuration of chips read at an age, which is an array, so that ages share a program.

    Args:
      config: of the crossbar.
      age: since programming (see `seconds`); None for the configuration's own.
      compensate: undo the mean drift digitally, or not; None for the configuration's own.

    Raises:
      ValueError: nothing in the configuration depends on time.
    """
    device = config.device
    if age is not None:
        over_time = isinstance(device.programming, Polynomial) and len(device.programming.seconds) > 1
        if seconds(age) and device.drift is None and not over_time:
            raise ValueError(
                f"an age of {age}, but these cells have no drift model: give device.drift, such as "
                "{model: PowerLaw, exponent: 0.01} or RERAM_CMO_DRIFT, in the configuration"
            )
        device = dataclasses.replace(device, time=jnp.float32(seconds(age)))
    if compensate is not None:
        device = dataclasses.replace(device, compensate=compensate)
    return dataclasses.replace(config, device=device)
