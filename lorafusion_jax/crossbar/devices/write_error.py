"""Programming (write) error: the conductance of a cell with target G, and write-verify.

A model is any function (G, key, time) -> G of normalised target conductances (Gmax = 1) and seconds since
programming (None: at once). Results may be negative: `realise` clips, which leaves half-normal noise on cells
whose target is zero.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ...support.platform import is_traced
from .physical import NUMBER, Physical, like, model, noise, varying_as, without_gradient

_KNOWN = NUMBER | np.ndarray | jax.Array  # tracers too
_ROUNDED = 1 + 1e-6  # an age in float32


@model(at_least_0=("sigma",))
class Independent:
    """Normal error of standard deviation `sigma` of Gmax for every cell."""

    sigma: Physical

    def __call__(
        self, G: Float[Array, "..."], key: Array, time: Physical = None
    ) -> Float[Array, "..."]:
        """Return G + sigma z."""
        return G + like(self.sigma, G) * noise(key, G)


@model(at_least_0=("sigma",))
class Proportional:
    """Normal error of standard deviation `sigma` of the cell's G."""

    sigma: Physical

    def __call__(
        self, G: Float[Array, "..."], key: Array, time: Physical = None
    ) -> Float[Array, "..."]:
        """Return G (1 + sigma z)."""
        return G * (1 + like(self.sigma, G) * noise(key, G))


class Measured:
    """A measured error: G + scale (shift(G) + deviation(G) z), from rows of numbers at some times.

    A cell keeps its draw: at a later time the same deviation is larger.
    """

    deviation: tuple[tuple[float, ...], ...]
    shift: tuple[tuple[float, ...], ...] | None
    seconds: tuple[float, ...]
    scale: Physical
    extrapolate: bool

    def __post_init__(self):
        name = type(self).__name__
        if (
            not self.seconds
            or self.seconds[0] <= 0
            or list(self.seconds) != sorted(set(self.seconds))
        ):
            raise ValueError(
                f"{name}.seconds = {self.seconds}: give rising positive times"
            )
        if self.extrapolate and len(self.seconds) < 2:
            raise ValueError(
                f"{name}.extrapolate needs two times, got seconds = {self.seconds}: give another one"
            )
        for field, rows in {"deviation": self.deviation, "shift": self.shift}.items():
            if rows is not None and (
                len(rows) != len(self.seconds)
                or not rows[0]
                or len({*map(len, rows)}) != 1
            ):
                raise ValueError(
                    f"{name}.{field} = {rows}: give one tuple of numbers, all of one length, for each of "
                    f"seconds = {self.seconds}"
                )

    def __call__(
        self, G: Float[Array, "..."], key: Array, time: Physical = None
    ) -> Float[Array, "..."]:
        """Return the conductances at `time`; NaN beyond the last of `seconds`, unless `extrapolate` is set."""
        error = self._spread(G, time) * noise(key, G)
        if self.shift is not None:
            error = error + self._of_cells(self._row(self.shift, G, time), G)
        return G + like(self.scale, G) * error

    def change(
        self, G: Float[Array, "..."], key: Array, start: Physical, time: Physical
    ) -> Float[Array, "..."]:
        """Return the change of cells of target `G` between two ages, if it does not depend on their error before."""
        grown = jnp.square(self._spread(G, time)) - jnp.square(self._spread(G, start))
        change = jnp.sqrt(jnp.maximum(grown, 0)) * noise(key, G)
        if self.shift is not None:
            later = self._row(self.shift, G, time) - self._row(self.shift, G, start)
            change = change + self._of_cells(later, G)
        return like(self.scale, G) * change

    def _spread(self, G: Array, time: Physical) -> Array:
        return jnp.maximum(self._of_cells(self._row(self.deviation, G, time), G), 0)

    def _of_cells(self, row: Float[Array, " n"], G: Array) -> Array:
        """Return the values of a row's polynomial or table at every cell."""
        raise NotImplementedError

    def check_age(self, time: Physical) -> None:
        """Raise a ValueError for a known age beyond the last measurement; tracers become NaN when they are used."""
        last = self.seconds[-1]
        if (
            len(self.seconds) < 2
            or self.extrapolate
            or not isinstance(time, _KNOWN)
            or is_traced(time)
        ):
            return
        if (oldest := float(np.max(time))) > last * _ROUNDED:
            raise ValueError(
                f"device.time = {oldest:g}, but the last measurement of device.programming is at {last:g} seconds: "
                "give an age up to it, or set extrapolate=True"
            )

    def _row(
        self, rows: tuple[tuple[float, ...], ...], G: Array, time: Physical
    ) -> Float[Array, " n"]:
        """Return the row at a time, interpolated in log time."""
        table = like(rows, G)
        if time is None or len(rows) < 2:
            return table[0]
        knots = jnp.log(like(self.seconds, G))
        time = like(time, G)
        log_time = jnp.log(jnp.maximum(time, self.seconds[0]))
        after = jnp.clip(jnp.searchsorted(knots, log_time), 1, len(rows) - 1)
        share = (log_time - knots[after - 1]) / (knots[after] - knots[after - 1])
        row = table[after - 1] + share * (table[after] - table[after - 1])
        if self.extrapolate:
            return row
        return jnp.where(time <= self.seconds[-1] * _ROUNDED, row, jnp.nan)


@model(at_least_0=("scale",))
class Polynomial(Measured):
    """A measured error, its standard deviation and mean fitted as polynomials of the target conductance.

    Attributes:
      deviation: coefficients of the standard deviation of Gmax, lowest power of G / Gmax first: one tuple for
        each of `seconds`. A fit that dips below zero counts as zero.
      shift: coefficients of the mean error in the same form; None for none.
      seconds: since programming, rising; between them coefficients are interpolated in log time. Earlier cells have
        those of the first. One time stands for every age: the cells' change is in `device.drift`.
      scale: multiplies shift and deviation.
      extrapolate: follow the last two times beyond the last; otherwise such ages are refused.
    """

    deviation: tuple[tuple[float, ...], ...]
    shift: tuple[tuple[float, ...], ...] | None = None
    seconds: tuple[float, ...] = (1.0,)
    scale: Physical = 1.0
    extrapolate: bool = False

    def _of_cells(self, row: Float[Array, " n"], G: Array) -> Array:
        return jnp.polyval(row[::-1], G)


@model(at_least_0=("scale",))
class Table(Measured):
    """A measured error at some target conductances, with linear interpolation between them.

    Attributes:
      targets: measured targets, rising shares of Gmax, from Gmin to Gmax.
      deviation: standard deviation of Gmax at each target: one tuple for each of `seconds`.
      shift: mean error in the same form; None for none.
      seconds: times as in `Polynomial`, and so are `scale` and `extrapolate`.
    """

    targets: tuple[float, ...]
    deviation: tuple[tuple[float, ...], ...]
    shift: tuple[tuple[float, ...], ...] | None = None
    seconds: tuple[float, ...] = (1.0,)
    scale: Physical = 1.0
    extrapolate: bool = False

    def __post_init__(self):
        super().__post_init__()
        at = self.targets
        if len(at) < 2 or list(at) != sorted(set(at)) or at[0] < 0 or at[-1] != 1:
            raise ValueError(
                f"Table.targets = {at}: give rising shares of Gmax that end in 1"
            )
        for row in (*self.deviation, *(self.shift or ())):
            if len(row) != len(self.targets):
                raise ValueError(
                    f"Table: {row} at {len(self.targets)} targets: give one number for each target"
                )

    @classmethod
    def from_measurements(
        cls,
        targets: Any,
        measured: Any,
        g_max: float,
        *,
        seconds: tuple[float, ...] = (1.0,),
        extrapolate: bool = False,
    ) -> "Table":
        """Return the table of measured cells: mean and standard deviation of the error at each target and time.

        Args:
          targets: [n] target of each cell, in the unit of `g_max`; each target occurs for two cells or more.
          measured: [n] conductances of the cells, or [T, n] at `seconds`; NaN where a reading is missing.
          g_max: conductance of full scale, which is the largest target.

        Raises:
          ValueError: shapes do not fit, the largest target is not `g_max`, or a target has fewer than two readings.
        """
        cells = np.asarray(targets, float) / g_max
        readings = np.atleast_2d(np.asarray(measured, float)) / g_max
        if readings.shape != (expected := (len(seconds), *cells.shape)):
            raise ValueError(
                f"measured of shape {np.shape(measured)} for {cells.size} targets and {len(seconds)} seconds: expected "
                f"{expected}"
            )
        levels = np.unique(cells)
        if abs(levels[-1] - 1) > 1e-6:
            largest = levels[-1] * g_max
            raise ValueError(
                f"the largest target is {largest:g} and g_max = {g_max:g}: measure cells at g_max, or give g_max = "
                f"{largest:g}, so that weights use conductances up to it"
            )
        rows = []
        for time, row in zip(seconds, readings - cells, strict=True):
            for level in levels:
                errors = row[(cells == level) & ~np.isnan(row)]
                if len(errors) < 2:
                    raise ValueError(
                        f"{len(errors)} readings at target {level * g_max:g} and {time:g} seconds: give two or more"
                    )
                rows.append((errors.mean(), errors.std(ddof=1)))
        by_time = np.reshape(rows, (len(seconds), len(levels), 2)).tolist()
        return cls(
            targets=(*levels[:-1].tolist(), 1.0),
            deviation=tuple(tuple(spread for _, spread in row) for row in by_time),
            shift=tuple(tuple(mean for mean, _ in row) for row in by_time),
            seconds=seconds,
            extrapolate=extrapolate,
        )

    def _of_cells(self, row: Float[Array, " n"], G: Array) -> Array:
        return jnp.interp(G, like(self.targets, G), row)


def _microsiemens(
    g_max: float, *rows: tuple[float, ...]
) -> tuple[tuple[float, ...], ...]:
    """Coefficients in uS of polynomials of G / Gmax, as fractions of Gmax."""
    return tuple(tuple(c / g_max for c in row) for row in rows)


PCM_JOSHI_2020 = Polynomial(_microsiemens(25.0, (0.26348, 1.9650, -1.1731)))
"""Phase-change memory, 25 uS. Joshi et al., Nature Communications 11, 2473 (2020), Fig. 3b; aihwkit's fit."""

RERAM_WAN_2022 = Polynomial(
    _microsiemens(
        40.0,
        (0.348, 16.030, -43.853, 45.393, -16.815),
        (0.701, 22.086, -50.773, 47.095, -16.458),
        (0.782, 20.274, -43.507, 37.062, -11.934),
    ),
    seconds=(1.0, 86_400.0, 172_800.0),
)
"""ReRAM of NeuRRAM, 40 uS, 1 s, 1 day and 2 days after write-verify: do not verify it again.

Wan et al., Nature 608, 504 (2022), Extended Data Fig. 3d; aihwkit's fit, in uS of 40 (its class divides by 25).
"""

RERAM_MILO_2021 = Polynomial(((4.782321 / 225.0, -0.009107),))
"""ReRAM, 50 to 225 uS (on/off ratio 4.5), algorithm IGVVA-100. Milo et al., IRPS 2021, Fig. 4; CrossSim's fit."""

RERAM_CMO_2025 = Polynomial(((0.0112185391 / 88.19, 0.01129027418),))
"""ReRAM of conductive metal oxide and HfOx, 9 to 88 uS, verified to 2 % of the target.

Falcone et al., arXiv:2502.04524 (2025); aihwkit's fit, whose slope is per uS of G.
"""


@model(above_0=("tolerance",))
class WriteVerify:
    """Program, read, and program again every cell outside the tolerance.

    Every pulse draws the cell's error anew, so that a cell takes 1 / P(|error| <= tolerance) pulses on average.

    Attributes:
      tolerance: largest accepted |G - target|, of Gmax.
      pulses: most pulses a cell gets.
    """

    tolerance: Physical
    pulses: int = 32

    def __post_init__(self):
        if not isinstance(self.pulses, int) or not 1 <= self.pulses <= 1_000_000:
            raise ValueError(
                f"WriteVerify.pulses = {self.pulses!r}: give the most pulses of a cell, 1 to 1,000,000"
            )

    def __call__(
        self,
        write: Callable[[Array, Array], Array],
        read: Callable[[Array, Array | int], Array],
        target: Float[Array, "..."],
        key: Array,
    ) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
        """Return the conductances and pulses of each cell.

        `write` is (target, key) -> G, one pulse on every cell; `read` is (G, number of the reading) -> G as it is read.
        """
        message = "has no gradient: a pulse is accepted or is not. Leave it out, or take differences"
        tolerance = without_gradient(
            like(self.tolerance, target), f"WriteVerify.tolerance {message}"
        )

        def outside(G: Array, pulse: Array | int) -> Array:
            return jnp.abs(read(G, pulse) - target) > tolerance

        def more(state: tuple[Array, ...]) -> Array:
            _, again, _, pulse = state
            return (pulse < self.pulses) & jnp.any(again)

        def rewrite(
            state: tuple[Array, ...],
        ) -> tuple[Array, ...]:
            G, again, count, pulse = state
            G = jnp.where(again, write(target, jax.random.fold_in(key, pulse)), G)
            count = count + again.astype(count.dtype)
            return G, again & outside(G, pulse + 1), count, pulse + 1

        first = varying_as(write(target, jax.random.fold_in(key, 0)), tolerance)
        once = varying_as(jnp.ones(target.shape, jnp.int32), first)
        G, _, count, _ = jax.lax.while_loop(
            more, rewrite, (first, outside(first, 1), once, jnp.int32(1))
        )
        return without_gradient(
            G, f"what is programmed through write-verify {message}"
        ), count
