"""Drift of programmed conductances with time, and its usual compensation.

A model is any function (G, key, time) -> G of programmed conductances (Gmax = 1) and seconds since programming.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .physical import NUMBER, Physical, like, model, noise

# Below this conductance log G is that of a cell which no longer conducts.
_FLOOR = 1e-7


@model()
class LogLinear:
    """A statistic of a cell with the logarithm of its conductance: clip(intercept + slope ln(G / Gmax), low, high)."""

    intercept: Physical
    slope: Physical
    low: Physical = 0.0
    high: Physical = 1.0

    def __post_init__(self):
        if (
            isinstance(self.low, NUMBER)
            and isinstance(self.high, NUMBER)
            and not self.low <= self.high
        ):
            raise ValueError(
                f"LogLinear: low = {self.low} is above high = {self.high}: exchange them"
            )

    def __call__(self, G: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the statistic of every cell."""
        value = like(self.intercept, G) + like(self.slope, G) * jnp.log(
            jnp.maximum(G, _FLOOR)
        )
        return jnp.clip(value, like(self.low, G), like(self.high, G))


@model(at_least_0=("magnitude", "largest"), above_0=("read_time",))
class Flicker:
    """1/f noise that has gathered since programming: relative deviation q(G) sqrt(ln((t + t_read) / (2 t_read))).

    Attributes:
      magnitude: q at Gmax.
      exponent: q grows as G^-exponent towards small conductances,
      largest: up to this.
      read_time: seconds of one read.
    """

    magnitude: Physical = 0.0088
    exponent: Physical = 0.65
    largest: Physical = 0.2
    read_time: Physical = 250e-9

    def deviation(
        self, G: Float[Array, "..."], time: Float[Array, ""]
    ) -> Float[Array, "..."]:
        """Return the relative standard deviation of each cell, `time` seconds after programming."""
        # The floor is that of the published fit: q is at its largest there.
        q = like(self.magnitude, G) / jnp.maximum(
            jnp.maximum(G, _FLOOR) ** like(self.exponent, G), 1e-3
        )
        read = like(self.read_time, G)
        gathered = jnp.maximum(
            (time + read) / (2 * read), 1
        )  # none within the first read
        return jnp.minimum(q, like(self.largest, G)) * jnp.sqrt(jnp.log(gathered))


@model(at_least_0=("exponent", "spread"), above_0=("start",))
class PowerLaw:
    """Drift by G ((t + t0) / t0)^-nu, with a different exponent nu for every cell.

    Attributes:
      exponent: mean of nu, a number or a `LogLinear` function of the programmed conductance.
      spread: standard deviation of nu, a number or a `LogLinear` function; |nu| is used, as in the published model.
      start: t0, when the cell was first read, in seconds after programming.
      flicker: gathered 1/f noise on top; None for none.
    """

    exponent: LogLinear | Physical
    spread: LogLinear | Physical = 0.0
    start: Physical = 1.0
    flicker: Flicker | None = None

    def __call__(
        self, G: Float[Array, "..."], key: Array, time: Physical
    ) -> Float[Array, "..."]:
        """Return the conductances at `time`."""
        t0 = like(self.start, G)
        t = like(time, G) + t0
        if isinstance(self.exponent, LogLinear):
            exponent = self.exponent(G)
        else:
            exponent = like(self.exponent, G)
        if isinstance(self.spread, LogLinear):
            spread = self.spread(G)
        else:
            spread = like(self.spread, G)
        nu = jnp.abs(exponent + spread * noise(jax.random.fold_in(key, 0), G))
        drifted = G * (t / t0) ** -nu
        if self.flicker is not None:
            drifted = drifted * (
                1 + self.flicker.deviation(G, t) * noise(jax.random.fold_in(key, 1), G)
            )
        return drifted


@model(at_least_0=("spread", "growth"))
class Relaxation:
    """A shift and a spread that grow with the logarithm of time: G + shift ln t + (spread + growth ln t) z, t >= 1 s.

    Attributes:
      shift: mean change per unit of ln t, of Gmax.
      spread: standard deviation after one second, of Gmax.
      growth: growth of the standard deviation per unit of ln t, of Gmax.
    """

    shift: Physical
    spread: Physical
    growth: Physical = 0.0

    def __call__(
        self, G: Float[Array, "..."], key: Array, time: Physical
    ) -> Float[Array, "..."]:
        """Return the conductances at `time`."""
        deviation = self._deviation(G, time)
        return G + like(self.shift, G) * _log_time(G, time) + deviation * noise(key, G)

    def change(
        self, G: Float[Array, "..."], key: Array, start: Physical, time: Physical
    ) -> Float[Array, "..."]:
        """Return the change between two ages, if it does not depend on what happened before."""
        before = self._deviation(G, start)
        grown = jnp.square(self._deviation(G, time)) - jnp.square(before)
        moved = _log_time(G, time) - _log_time(G, start)
        spread = jnp.sqrt(jnp.maximum(grown, 0))
        return like(self.shift, G) * moved + spread * noise(key, G)

    def _deviation(self, G: Array, time: Physical) -> Array:
        return like(self.spread, G) + like(self.growth, G) * _log_time(G, time)


def _log_time(G: Array, time: Physical) -> Array:
    return jnp.log(jnp.maximum(like(time, G), 1))


PCM_DRIFT = PowerLaw(
    exponent=LogLinear(0.0244, -0.0155, 0.049, 0.1),
    spread=LogLinear(-0.0059, -0.0125, 0.008, 0.045),
    start=20.0,
    flicker=Flicker(),
)
"""Phase-change memory: exponents, their spread, and 1/f noise.

Nandakumar et al., ICECS 2019; Joshi et al., Nature Communications 11, 2473 (2020); aihwkit's constants, which it uses
with the target conductance instead of the programmed one.
"""

RERAM_CMO_DRIFT = Relaxation(
    shift=-0.08900206 / 88.19, spread=0.41183342 / 88.19, growth=0.04201137 / 88.19
)
"""ReRAM of conductive metal oxide and HfOx, 88 uS. Falcone et al., arXiv:2502.04524 (2025); aihwkit's constants."""


def drift_compensation(
    reference: Float[Array, "..."], aged: Float[Array, "..."]
) -> Float[Array, ""]:
    """Return the one factor by which a matrix's outputs are multiplied digitally to undo its mean drift.

    Global drift compensation (Joshi et al. 2020) as in aihwkit: the mean absolute weight just after programming, which
    reads of one-hot inputs measure, over that now; 1 where all weights are zero.
    """
    before = jnp.sum(jnp.abs(reference))
    after = jnp.sum(jnp.abs(aged))
    return jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 1)
