"""A matrix as written, and the factors of the inputs that follow from it, with the variances of their noise."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float

from ..config.schema import CrossbarConfig
from ..mapping import decoding, encoding
from ..mapping.geometry import Cells, Columns, Gains, Geometry
from ..read.conversion_noise import powers
from .plan import Plan


class Laid(NamedTuple):
    """Columns that multiply the inputs, in the form that the plan's path needs (see `Chip`)."""

    plan: Plan
    columns: Any = None
    variance: Float[Array, "..."] | None = None
    occupied: Bool[Array, "k R"] | None = None


class Written(NamedTuple):
    """A matrix in cells; without them in perfect pairs, whose signed digits are in `slices`."""

    plan: Plan
    cells: Cells | None
    slices: Float[Array, "K d_in d_out"]
    gain: Gains | None
    geometry: Geometry
    config: CrossbarConfig

    def variance(self) -> Columns | None:
        """Return the variances of the columns' read noise at sigma = 1, or None without noise."""
        if self.cells is None or self.config.device.read_noise is None:
            return None
        cell_powers = powers(self.cells, self.geometry, self.config)
        return decoding.column_variances(
            cell_powers, self.geometry, self.config, self.gain
        )

    def columns(self) -> Columns:
        """Return the columns."""
        if self.cells is None:
            return encoding.split(self.slices, self.geometry.rows, 1, front=True)
        # The cells' values reach the gradient through the codes.
        return decoding.columns(
            jax.lax.stop_gradient(self.cells), self.geometry, self.config, self.gain
        )
