"""The cells of one chip: actual conductances from target conductances.

Conductances are normalised to Gmax = 1. The order of effects is programming error (with write-verify if it is set),
stuck cells, and drift until `time`; after each, conductances are clipped to the possible values. Read noise and
nonlinear I-V belong to a read: they are described here and applied there.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .drift import Relaxation
from .physical import (
    NUMBER,
    Physical,
    check_bounds,
    for_each_cell,
    like,
    model,
    noise,
    require,
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


@model(at_least_0=("sigma",))
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


@model(at_least_0=("deviation", "offset", "gain", "after"))
class Readback:
    """Readings of single cells while they are written, by write-verify and `cell.residual`.

    Attributes:
      deviation: standard deviation of one reading, of Gmax.
      offset: standard deviation of each column's offset, of Gmax, drawn once per chip.
      gain: standard deviation of each column's gain, drawn once per chip.
      repeats: readings of a cell that are averaged.
      after: seconds between writing and reading, where cells have an age (`device.time`).
    """

    deviation: Physical = 0.0
    offset: Physical = 0.0
    gain: Physical = 0.0
    repeats: int = 1
    after: Physical = 1.0

    def __post_init__(self):
        valid = isinstance(self.repeats, int) and self.repeats >= 1
        require(self, "repeats", valid, "give the readings of a cell, 1 or more")

    def __call__(
        self, G: Float[Array, "*N rows cols"], key: Array, column_key: Array
    ) -> Float[Array, "*N rows cols"]:
        """Return the conductances as they are read."""
        columns = G[..., :1, :]
        gain = 1 + like(self.gain, G) * noise(
            jax.random.fold_in(column_key, 0), columns
        )
        offset = like(self.offset, G) * noise(
            jax.random.fold_in(column_key, 1), columns
        )
        deviation = like(self.deviation, G) / self.repeats**0.5
        return G * gain + offset + deviation * noise(key, G)


DeviceModel = Callable[[Array, Array, Any], Array]
# Fields that hold an object, and what to give for them.
_PARTS = {
    "programming": "a function (G, key, time) -> G, such as Independent(0.01)",
    "write_verify": "WriteVerify(...)",
    "readback": "Readback(...)",
    "stuck": "StuckAt(...)",
    "drift": "a function (G, key, time) -> G, such as PowerLaw(0.05)",
    "read_noise": "ReadNoise(...)",
    "iv": "a function (v, G) -> current, such as Sinh()",
}


@model(kw_only=True)
class Device:
    """Differences of a cell from an ideal conductance; None is ideal for each.

    Attributes:
      programming: (G, key, time) -> G, of target conductances: a model of `write_error`, or a function.
      write_verify: program until within a tolerance, counting pulses; needs `programming`.
      readback: errors of the readings that write-verify and `cell.residual` use; None for perfect ones. Relaxation goes
        on after it, independent of what was read.
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
    readback: Readback | None = None
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
            # A plain function is not a pytree: wrapped, it is structure, compared by identity.
            if callable(value) and jax.tree_util.all_leaves([value]):
                object.__setattr__(self, name, jax.tree_util.Partial(value))
        check_bounds(self, "time", 0)
        if self.write_verify is not None and self.programming is None:
            raise ValueError(
                "Device.write_verify repeats a programming error until it is small: give programming too"
            )
        after = getattr(self.readback, "after", None)
        if (
            isinstance(after, NUMBER)
            and isinstance(self.time, NUMBER)
            and after > self.time
        ):
            raise ValueError(
                f"device.readback.after = {after:g} is later than device.time = {self.time:g}: give an earlier reading"
            )
        ages = self.write_verify is None or self.readback is not None
        if isinstance(self.programming, Measured) and ages:
            self.programming.check_age(self.time)


def depends_on_time(device: Device) -> bool:
    """Return whether the cells depend on the time since programming; functions of users are taken to."""
    programming = device.programming
    if isinstance(programming, Measured):
        return device.drift is not None or len(programming.seconds) > 1
    return device.drift is not None or not (
        programming is None or isinstance(programming, Independent | Proportional)
    )


class Realised(NamedTuple):
    """Cells of one chip.

    Attributes:
      conductances: conductances `device.time` after programming.
      read: conductances that a reading while they are written returns.
      pulses: pulses of each cell; None without write-verify.
    """

    conductances: Float[Array, "..."]
    read: Float[Array, "..."]
    pulses: Int[Array, "..."] | None


def realise(
    G: Float[Array, "..."], device: Device, key: Array | None, *, g_min: Physical = 0.0
) -> Realised:
    """Return the cells of one chip, given their target conductances. A random device needs the chip's key."""
    drift = None if device.time is None else device.drift
    if device.programming is None and device.stuck is None and drift is None:
        G = _clip(G, device, g_min)
        return Realised(G, G, None)
    assert key is not None
    target = G
    program_key = jax.random.fold_in(key, 0)
    stuck_key = jax.random.fold_in(key, 1)
    drift_key = jax.random.fold_in(key, 2)
    read_key = jax.random.fold_in(key, 3)
    column_key = jax.random.fold_in(key, 4)
    change_key = jax.random.fold_in(key, 5)
    readback = device.readback
    # Age of cells that are read back; afterwards they go on to `device.time`.
    start = None if readback is None or device.time is None else readback.after
    at_once = device.write_verify is not None or readback is not None
    written_at = start if at_once else device.time

    def with_stuck_cells(G: Array) -> Array:
        return G if device.stuck is None else device.stuck(G, stuck_key, g_min)

    def write(target: Array, pulse_key: Array) -> Array:
        if device.programming is not None:
            conductances = for_each_cell(
                "programming",
                device.programming(target, pulse_key, written_at),
                target.shape,
            )
            target = _clip(conductances, device, g_min)
        return with_stuck_cells(target)

    def read(G: Array, number: Array | int) -> Array:
        if readback is None:
            return G
        if start is not None and drift is not None:
            G = _clip(drift(G, drift_key, start), device, g_min)
        return readback(G, jax.random.fold_in(read_key, number), column_key)

    pulses = None
    if device.write_verify is None:
        G = write(target, program_key)
    else:
        G, pulses = device.write_verify(write, read, target, program_key)
    seen = read(G, 0)
    if start is not None and isinstance(device.programming, Measured):
        change = device.programming.change(target, change_key, start, device.time)
        G = with_stuck_cells(_clip(G + change, device, g_min))
    if drift is not None:
        if start is not None and isinstance(drift, Relaxation):
            change_key = jax.random.fold_in(change_key, 1)
            change = drift.change(G, change_key, start, device.time)
            G = drift(G, drift_key, start) + change
        else:
            G = for_each_cell("drift", drift(G, drift_key, device.time), G.shape)
    G = _clip(G, device, g_min)
    return Realised(G, G if readback is None else seen, pulses)


_SIGNIFICANCES = np.geomspace(0.01, 1, 47)


def best_significance(device: Device, g_min: float) -> float:
    """Return the full scale of a second pair of analogue cells, of the first's, for the least error of normal weights.

    Weights have a standard deviation of a third of the first pair's full scale, beyond which they are clipped. The
    second pair stores what the first one missed, as it is read back.
    """
    best = int(jnp.argmin(_errors_of_two_pairs(device, g_min)))
    return round(float(_SIGNIFICANCES[best]), 3)


@functools.partial(jax.jit, static_argnames=("device", "g_min"))
def _errors_of_two_pairs(device: Device, g_min: float) -> Float[Array, " scales"]:
    """Return the mean square error of both pairs together, for every significance of the second."""
    key = jax.random.key(0)
    draws = np.random.default_rng(0).normal(scale=1 / 3, size=(256, 64))
    codes = jnp.asarray(np.clip(draws, -1, 1), jnp.float32)

    def pair(codes: Array, key: Array) -> tuple[Array, Array]:
        digits = jnp.stack([jnp.maximum(codes, 0), jnp.maximum(-codes, 0)])
        cells = realise(g_min + digits * (1 - g_min), device, key, g_min=g_min)
        actual = (cells.conductances[0] - cells.conductances[1]) / (1 - g_min)
        return actual, (cells.read[0] - cells.read[1]) / (1 - g_min)

    first, read = pair(codes, jax.random.fold_in(key, 1))
    missed = codes - read

    def power(scale: Array) -> Array:
        stored = jnp.clip(missed / scale, -1, 1)
        second, _ = pair(stored, jax.random.fold_in(key, 2))
        return jnp.mean(jnp.square(first + scale * second - codes))

    return jax.lax.map(power, jnp.asarray(_SIGNIFICANCES, codes.dtype))


def _clip(G: Array, device: Device, g_min: Physical) -> Array:
    if device.clip == "positive":
        return jnp.maximum(G, 0)
    return jnp.clip(G, like(g_min, G), like(1.0, G))
