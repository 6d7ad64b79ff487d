"""The plan of a read, what decides its path, and the columns of its arrays. docs/concepts/reads.md lists the paths."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ...support.platform import is_traced
from ..config.schema import CrossbarConfig
from ..mapping import decoding, encoding
from ..mapping.adc.quantiser import Ties, are_power_steps, level_units
from ..mapping.bit_fields import BitFields
from ..mapping.geometry import Cells, Columns, Gains, Geometry
from ..read.conversion_noise import powers

ON_REQUEST = "asked for"  # reason of a path that the caller requested


@dataclasses.dataclass(frozen=True)
class Plan:
    """The path of a read, and the reason of its choice.

    Attributes:
      path: its name in `read.paths.PATHS`.
      integers: column sums, before read noise, are integers.
      bit_fields: fields of the weight slices in the words of `lookup` and `packed`; None without words.
      ties: method that keeps the codes of sums half-way between two codes exact.
    """

    path: str
    reason: str
    integers: bool
    bit_fields: BitFields | None = None
    ties: Ties = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadRequirements:
    """Everything that decides the path of a read.

    Attributes:
      integers, ties: see `Plan`.
      telescopes: all slices and tiles add up to one product.
      nonlinear: reason why an array's sums are not linear in its inputs and cells, or None.
      of_cells: reason why single cells are needed instead of one product per slice, or None.
    """

    geometry: Geometry
    config: CrossbarConfig
    integers: bool
    ties: Ties
    telescopes: bool
    nonlinear: str | None
    of_cells: str | None

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        config: CrossbarConfig,
        limits: Array | np.ndarray | None,
        *,
        perfect: bool,
    ) -> "ReadRequirements":
        """Return them for traced, so unknown, or other `limits` [_, K, 2]; `perfect` cells are at their targets."""
        known = (
            None
            if limits is None or is_traced((limits, level_units(geometry, config)))
            else np.asarray(limits)
        )
        nonlinear = _nonlinearity(config)
        of_cells = _needs_cells(config)
        integers = perfect and nonlinear is None and sums_integers(config)
        lossless = integers and _is_lossless(geometry, config, known)
        return cls(
            geometry=geometry,
            config=config,
            integers=integers,
            ties=_exact_ties(geometry, config, known) if integers else None,
            telescopes=nonlinear is None
            and (lossless or (config.adc is None and of_cells is None)),
            nonlinear=nonlinear,
            of_cells=of_cells,
        )

    @property
    def unlike_products(self) -> str | None:
        """Reason why conversions cannot be computed as products of slices, or None."""
        return (
            self.nonlinear
            or self.of_cells
            or ("this without an ADC" if self.config.adc is None else None)
        )

    @property
    def bits(self) -> float:
        """Bits of the widest input in a conversion; infinitely many if it is not one input slice."""
        slices = None if self.config.converts_sums else self.geometry.converted_slices
        return math.inf if slices is None else float(max(slices))


def _exact_ties(
    geometry: Geometry, config: CrossbarConfig, limits: np.ndarray | None
) -> Ties:
    """Return how ties of integer sums are kept exact; `calibrated` ranges get steps of powers of two."""
    if config.adc is None or config.distorts or config.draws_at_conversion:
        return None
    powers = config.adc.range == "calibrated" or (
        limits is not None and are_power_steps(limits, geometry, config)
    )
    return "shift" if powers else "divide"


def _nonlinearity(config: CrossbarConfig) -> str | None:
    """Return the reason why an array's sums are not linear in its inputs and cells, or None if they are."""
    if config.tile.wire is not None:
        return "IR drop depends on all currents of an array"
    if config.device.iv is not None:
        return "cells are nonlinear"
    if config.tile.current_limit is not None:
        return "column currents are limited before they are subtracted"
    return None


def _needs_cells(config: CrossbarConfig) -> str | None:
    """Return the reason why single cells are needed instead of one product per slice, or None."""
    if config.adc is not None and config.adc.offset_error is not None:
        return "every column's ADC has its offset"
    if config.distorts:
        return "its ADC has a transfer curve"
    if config.encoding.flip and (
        config.adc is not None or config.device.read_noise is not None
    ):
        return "columns that are stored inverted"
    noise = config.device.read_noise
    if noise is not None and noise.clip:
        return "read noise is clipped cell by cell"
    if noise is not None and config.converts_sums:
        return "read noise of every input slice adds up before the ADC"
    return None


def sums_integers(config: CrossbarConfig) -> bool:
    """Return whether column sums of perfect cells are integers in level units."""
    if config.cell.bits is None or config.dac is None or config.mismatched:
        return False
    if config.converts_each and config.encoding.two_sided:
        return False  # halves of odd digits
    subtracted = config.encoding.kind == "differential" and not config.converts_each
    return config.cell.on_off_ratio is None or subtracted  # else Gmin reaches the ADC


def _is_lossless(
    geometry: Geometry, config: CrossbarConfig, limits: np.ndarray | None
) -> bool:
    """Return whether every possible (integer) column sum has a separate code that represents it exactly."""
    adc = config.adc
    if (
        adc is None
        or geometry.code_range is None
        or isinstance(adc.bits, tuple)
        or config.distorts
        or config.draws_at_conversion
    ):
        return False
    if adc.range == "granular":
        return max(geometry.bounds) <= geometry.code_range[1]
    return limits is not None and bool(loses_nothing(limits, geometry, config))


def loses_nothing(
    limits: np.ndarray | Float[Array, "_R K 2"],
    geometry: Geometry,
    config: CrossbarConfig,
) -> np.bool_ | Bool[Array, ""]:
    """Return whether ADCs with these limits have a code for every possible integer sum."""
    xp = jnp if isinstance(limits, jax.Array) else np
    assert geometry.code_range is not None
    top = geometry.code_range[1]
    inv_lsb = top / (
        limits[..., 1] * xp.asarray(level_units(geometry, config), limits.dtype)[None]
    )
    step = xp.round(inv_lsb)
    whole = (step >= 1) & (abs(inv_lsb - step) < 1e-6 * step)
    return xp.all(
        whole & (xp.asarray(geometry.bounds, limits.dtype)[None] * step <= top)
    )


class ColumnLayout(NamedTuple):
    """Columns that multiply the inputs, in the form that the plan's path needs (see `Chip`)."""

    plan: Plan
    columns: Any = None
    variance: Float[Array, "..."] | None = None
    occupied: Bool[Array, "k R"] | None = None


class ProgrammedCells(NamedTuple):
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
