"""The cells of one chip: actual conductances from target conductances.

Conductances are normalised to Gmax = 1. The order of effects is programming error (with write-verify if it is set),
stuck cells, and drift until `time`; after each, conductances are clipped to the possible values. Read noise and
nonlinear I-V belong to a read: they are described here and applied there.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .physical import (
    NUMBER,
    Physical,
    check_bounds,
    for_each_cell,
    like,
    model,
    noise,
    without_gradient,
)
from .write_error import Independent, Measured, Proportional, WriteVerify


@model()
class StuckAt:
    """Shares of cells that no longer switch, stuck at Gmin (`low`) or at Gmax (`high`), drawn once per chip."""

    low: Physical = 0.0
    high: Physical = 0.0

    def __post_init__(self):
        check_bounds(self, "low", 0, 1)
        check_bounds(self, "high", 0, 1)
        if (
            isinstance(self.low, NUMBER)
            and isinstance(self.high, NUMBER)
            and self.low + self.high > 1
        ):
            raise ValueError(
                f"StuckAt: low + high = {self.low + self.high}: expected a sum of at most 1"
            )

    def __call__(
        self, G: Float[Array, "..."], key: Array, g_min: Physical
    ) -> Float[Array, "..."]:
        """Return `G` with the stuck cells in it."""
        message = "StuckAt.{} has no gradient: a cell is stuck or is not. Leave it out, or take differences"
        low = without_gradient(like(self.low, G), message.format("low"))
        high = without_gradient(like(self.high, G), message.format("high"))
        u = jax.random.uniform(key, G.shape, G.dtype)
        return jnp.where(
            u >= 1 - high, like(1.0, G), jnp.where(u < low, like(g_min, G), G)
        )


@model("kind", "clip", at_least_0=("sigma",))
class ReadNoise:
    """Normal noise that is drawn again for every read.

    Attributes:
      sigma: standard deviation, as a fraction of Gmax (`independent`) or of the cell's G (`proportional`).
      kind: `independent` or `proportional`.
      clip: clip each cell's draw to G >= 0 (CrossSim does). A column's noise is then no longer normal, so that every
        cell has to be drawn instead of every conversion.
    """

    sigma: Physical
    kind: Literal["independent", "proportional"] = "independent"
    clip: bool = False

    def draw(self, G: Float[Array, "..."], key: Array) -> Float[Array, "..."]:
        """Return the conductances of one read."""
        scale = like(self.sigma, G) * (G if self.kind == "proportional" else 1)
        noisy = G + scale * noise(key, G)
        return jnp.maximum(noisy, 0) if self.clip else noisy


@model(above_0=("read_voltage", "scale"))
class Sinh:
    """Nonlinear I-V: I = G sinh(v Vr / V0) / sinh(Vr / V0), with v of the read voltage Vr.

    G is the conductance at Vr: inputs of one bit see no nonlinearity.

    Attributes:
      read_voltage: Vr, in volts.
      scale: V0, in volts; 0.25 V in the Stanford-PKU ReRAM model (Jiang et al., SISPAD 2014).
    """

    read_voltage: Physical = 0.2
    scale: Physical = 0.25

    def __call__(
        self, v: Float[Array, "..."], G: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Return the current of every cell, in units of Gmax Vr; `v` and `G` broadcast."""
        a = like(self.read_voltage, v) / like(self.scale, v)
        return G * (jnp.sinh(a * v) / jnp.sinh(a))


DeviceModel = Callable[[Array, Array, Any], Array]
# Fields that hold an object, and what to give for them.
_PARTS = {
    "programming": "a function (G, key, time) -> G, such as Independent(0.01)",
    "write_verify": "WriteVerify(...)",
    "stuck": "StuckAt(...)",
    "drift": "a function (G, key, time) -> G, such as PowerLaw(0.05)",
    "read_noise": "ReadNoise(...)",
    "iv": "a function (v, G) -> current, such as Sinh()",
}


@model("compensate", "clip", kw_only=True)
class Device:
    """Differences of a cell from an ideal conductance; None is ideal for each.

    Attributes:
      programming: (G, key, time) -> G, of target conductances: a model of `write_error`, or a function.
      write_verify: program until within a tolerance, counting pulses; needs `programming`.
      stuck: shares of cells that cannot be programmed.
      drift: (G, key, time) -> G, of programmed conductances: a model of `drift`, or a function.
      time: seconds since programming, within those of a measured `programming`; None: read at once, without drift.
      compensate: multiply a matrix's outputs by one factor that undoes its mean drift (`drift_compensation`).
      read_noise: noise that is drawn again for each read.
      iv: (v, G) -> current of a cell at v of the read voltage: `Sinh`, or a function.
      clip: possible values of a cell: `positive` G >= 0, or `range` [Gmin, Gmax].
    """

    programming: DeviceModel | None = None
    write_verify: WriteVerify | None = None
    stuck: StuckAt | None = None
    drift: DeviceModel | None = None
    time: Physical = None
    compensate: bool = False
    read_noise: ReadNoise | None = None
    iv: Callable[[Array, Array], Array] | None = None
    clip: Literal["positive", "range"] = "positive"

    def __post_init__(self):
        for name, example in _PARTS.items():
            value = getattr(self, name)
            if isinstance(value, NUMBER | str | np.ndarray | jax.Array):
                raise ValueError(
                    f"Device.{name} = {value!r}: give {example}, or None where it is absent"
                )
        check_bounds(self, "time", 0)
        if self.write_verify is not None and self.programming is None:
            raise ValueError(
                "Device.write_verify repeats a programming error until it is small: give programming too"
            )
        if isinstance(self.programming, Measured) and self.write_verify is None:
            self.programming.check_age(self.time)
        for name in ("programming", "drift", "iv"):
            function = getattr(self, name)
            # A plain function is not a pytree: wrapped, it is structure, compared by identity.
            if callable(function) and jax.tree_util.all_leaves([function]):
                object.__setattr__(self, name, jax.tree_util.Partial(function))


def depends_on_time(device: Device) -> bool:
    """Return whether the cells depend on the time since programming; functions of users are taken to."""
    programming = device.programming
    if isinstance(programming, Measured):
        return device.drift is not None or len(programming.seconds) > 1
    return device.drift is not None or not (
        programming is None or isinstance(programming, Independent | Proportional)
    )


def realise(
    G: Float[Array, "..."], device: Device, key: Array | None, *, g_min: Physical = 0.0
) -> tuple[Float[Array, "..."], Int[Array, "..."] | None]:
    """Return the actual conductances of one chip's cells, `device.time` after programming, and each cell's pulses.

    Pulses are None without write-verify. A random device needs the chip's key.
    """
    drift = None if device.time is None else device.drift
    if device.programming is None and device.stuck is None and drift is None:
        return _clip(G, device, g_min), None
    assert key is not None
    program_key = jax.random.fold_in(key, 0)
    stuck_key = jax.random.fold_in(key, 1)
    drift_key = jax.random.fold_in(key, 2)

    def write(target: Array, pulse_key: Array) -> Array:
        if device.programming is not None:
            # A verified cell is measured at once; it ages afterwards.
            time = None if device.write_verify is not None else device.time
            conductances = for_each_cell(
                "programming", device.programming(target, pulse_key, time), G.shape
            )
            target = _clip(conductances, device, g_min)
        return (
            target if device.stuck is None else device.stuck(target, stuck_key, g_min)
        )

    pulses = None
    if device.write_verify is None:
        G = write(G, program_key)
    else:
        G, pulses = device.write_verify(write, G, program_key)
    if drift is not None:
        G = for_each_cell("drift", drift(G, drift_key, device.time), G.shape)
    return _clip(G, device, g_min), pulses


def _clip(G: Array, device: Device, g_min: Physical) -> Array:
    if device.clip == "positive":
        return jnp.maximum(G, 0)
    return jnp.clip(G, like(g_min, G), like(1.0, G))
