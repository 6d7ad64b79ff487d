"""Explanation of a matrix on a crossbar: its arrays, and the path of its products."""

import dataclasses
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..chip.chip import Chip
from ..chip.plan import Plan, sums_integers
from ..chip.program import has_errors, program
from ..config.schema import CrossbarConfig
from ..mapping.geometry import Geometry
from ..preparation.code_errors import unused_levels
from ..preparation.preparation import Preparation
from .energy import ADCModel, conversion_energy, counts, geometry_of

_SHARES = (
    "{stopped:.2f} of full conversions in one converter that is stopped early, {designed:.2f} in a converter "
    "designed for each weight slice, {both:.2f} in one that is also stopped"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """The arrays of a matrix and the path of its products, which `print` shows as text.

    Attributes:
      tiles: row tiles and column tiles.
      array: rows and columns of one array, a unit column not counted.
      slices: weight slices, also those of analogue cells.
      weight_slices: bits of each weight slice; () for an analogue cell.
      input_slices: bits of each input slice; () for an ideal DAC.
      arrays: arrays of one matrix: tiles x weight slices x polarities.
      utilisation: share of their cells that hold a weight.
      conversions: conversions of the ADCs for one input vector; 0 without ADC.
      adc_energy: energy of a matrix's conversions, of that of full ones, by the models of `conversion_energy`; None
        unless `adc.bits` is a table.
      lost_bits: for each weight slice, the bits that its ADC lacks to distinguish all column sums of perfect cells;
        None if sums are not integers.
      preparation: changes of the weights before they are written; () for none.
      unused_levels: weight slices whose top level no weight reaches (see `unused_levels`); None for none.
    """

    shape: tuple[int, int]
    path: str
    reason: str
    tiles: tuple[int, int]
    array: tuple[int, int]
    slices: int
    weight_slices: tuple[int, ...]
    input_slices: tuple[int, ...]
    polarities: int
    arrays: int
    utilisation: float
    conversions: int
    adc_energy: dict[str, float] | None
    lost_bits: tuple[float, ...] | None
    preparation: tuple[str, ...]
    unused_levels: str | None

    def __str__(self) -> str:
        count = self.slices
        slices = f"{count} weight slice{'s' if count > 1 else ''}"
        signs = f" x {self.polarities} polarities" if self.polarities > 1 else ""
        lines = [
            ("path", f"{self.path}: {self.reason}"),
            (
                "weights",
                _bits(
                    self.weight_slices,
                    "one analogue cell"
                    if count == 1
                    else "two analogue cells, the second for what the first missed",
                )
                + signs.replace(" x", ","),
            ),
            ("inputs", _bits(self.input_slices, "real-valued, all at once")),
            (
                "arrays",
                f"{self.arrays:,} = {self.tiles[0]} x {self.tiles[1]} tiles x {slices}{signs}",
            ),
            ("utilisation", f"{100 * self.utilisation:.1f} % of their cells"),
            (
                "conversions",
                f"{self.conversions:,} for one input vector"
                if self.conversions
                else "none, no ADC",
            ),
            ("ADC energy", self.adc_energy and _SHARES.format(**self.adc_energy)),
            ("lost bits", _lost(self.lost_bits)),
            ("prepared", ", ".join(self.preparation)),
            ("unused", self.unused_levels),
        ]
        title = f"{self.shape[0]} x {self.shape[1]} on arrays of {self.array[0]} x {self.array[1]}"
        texts = [f"  {name:<12} {text}" for name, text in lines if text]
        return "\n".join([title, *texts])


def explain(
    what: CrossbarConfig | Chip, shape: tuple[int, ...] | None = None
) -> Explanation:
    """Return the arrays and the path of a [d_in, d_out] matrix on a crossbar, without programming it.

    The path is valid for any weights of this shape. A chip's path may be faster, because its column sums are known and
    a calibrated ADC may lose nothing.

    Args:
      what: a configuration, with a shape; or a chip, which has both.
      shape: rows and columns. Narrow matrices that share arrays, such as factors of low-rank modules, are one matrix.

    Raises:
      ValueError: the shape is not valid, or is not that of the chip.
    """
    if isinstance(what, Chip):
        if shape is not None and tuple(shape) != what.matrix_shape:
            raise ValueError(
                f"shape {tuple(shape)}: expected that of the chip, {what.matrix_shape}; leave it out"
            )
        config = what.config
        geometry = geometry_of(what.matrix_shape, config)
        plan = what.plan
        white = what.preparation is not None and what.preparation.white
    else:
        config = what
        geometry = geometry_of(shape, config)
        plan = _plan(config, geometry.shape)
        white = False
    d_in, d_out = geometry.shape
    taken = counts(geometry.shape, config)
    ranges = "ranges of the largest weights: no errors"
    if has_errors(config):
        ranges = "ranges chosen for the device's errors"
    mapping = config.mapping
    transform = f"{mapping.transform} transform with {taken.transforms:,} additions for one input vector"
    changes = {
        "factors": mapping.factors,
        transform: mapping.transform != "none",
        ranges: mapping.clip == "optimal",
        "for inputs of equal power": white,
    }
    adc = config.adc
    adc_energy = None
    if adc is not None and isinstance(adc.bits, tuple):
        full = conversion_energy(dataclasses.replace(adc, bits=adc.full_bits)).typical
        left = float(np.count_nonzero(adc.bits) / np.size(adc.bits))
        adc_energy = {
            model: left * conversion_energy(adc, model=model).typical / full
            for model in get_args(ADCModel)
        }
    tiles = (len(geometry.rows), len(geometry.cols))
    array = (config.tile.rows or d_in, config.tile.cols or d_out)
    return Explanation(
        shape=(d_in, d_out),
        path=plan.path,
        reason=plan.reason,
        tiles=tiles,
        array=array,
        slices=len(config.weight_slices),
        weight_slices=() if config.cell.bits is None else config.weight_slices,
        input_slices=config.dac.slices if config.dac else (),
        polarities=geometry.polarities,
        arrays=taken.arrays,
        utilisation=d_in * d_out / (math.prod(tiles) * math.prod(array)),
        conversions=taken.conversions,
        adc_energy=adc_energy,
        lost_bits=_lost_bits(geometry, config),
        preparation=tuple(change for change, made in changes.items() if made),
        unused_levels=unused_levels(config),
    )


def _plan(config: CrossbarConfig, shape: tuple[int, int]) -> Plan:
    """Return the plan that programming would make, without computing anything."""
    plans = []

    def add_plan(weights: Array) -> None:
        key = jax.random.key(0)
        plans.append(program(weights, config, key, preparation=Preparation()).plan)

    jax.eval_shape(add_plan, jax.ShapeDtypeStruct(shape, jnp.float32))
    return plans[0]


def _lost_bits(geometry: Geometry, config: CrossbarConfig) -> tuple[float, ...] | None:
    if config.cell.bits is None or config.dac is None:
        return None
    if geometry.code_range is None:
        return tuple(0.0 for _ in config.weight_slices)
    if not sums_integers(config):
        return None
    adc = config.adc
    stopped = [0] * len(geometry.bounds)
    if adc is not None and isinstance(adc.bits, tuple):
        stopped = [
            adc.full_bits - min(filter(None, row), default=0) for row in adc.bits
        ]
    return tuple(
        max(0.0, math.log2(bound / geometry.code_range[1]) + bits)
        for bound, bits in zip(geometry.bounds, stopped, strict=True)
    )


def _bits(slices: tuple[int, ...], none: str) -> str:
    if not slices:
        return none
    top = f"{slices[-1]} bit{'s' if slices[-1] > 1 else ''}"
    if len(set(slices)) == 1:
        return f"{len(slices)} slices of {top}"
    listed = ", ".join(map(str, slices))
    return f"slices of {listed} bits, least significant first; top slice: {top}"


def _lost(bits: tuple[float, ...] | None) -> str:
    if bits is None:
        return "not defined: column sums are real-valued"
    if not any(bits):
        return "none"
    if len(set(bits)) == 1:
        return f"{bits[0]:.1f} of every slice, at worst"
    return f"{', '.join(f'{lost:.1f}' for lost in bits)} from the least significant slice, at worst"
