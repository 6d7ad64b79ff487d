"""The geometry of a matrix on arrays: everything that its shape and the structure of its configuration decide.

Level units: a cell holds g in 0 .. 2^p - 1 (p its bits), an input slice u with |u| <= 2^s - 1, so that a perfect
array's column sums are integers. Slices run from the least significant.
"""

import dataclasses
import itertools
import math

import numpy as np
from jaxtyping import Array, Bool, Float

from ..config.schema import CrossbarConfig

# Arrays of a matrix: its codes, the cells, columns that are stored inverted, gains or offsets of conversions, and the
# factors of the inputs at every conversion.
Codes = Float[Array, "d_in d_out"]
Cells = Float[Array, "K P R C rows cols"]
Flipped = Bool[Array, "K R C _cols"]
Gains = Float[Array, "K _P R C cols"]
Columns = Float[Array, "k R rows _cols"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Tiles, levels and bounds of a matrix on arrays. They are plain numbers: a static part of a chip.

    Attributes:
      rows: rows of every row tile, and `cols` columns of every column tile, without a unit column.
      polarities: 2 for differential encoding, else 1.
      code_scale: integer that full scale maps to: 2^(B-1) - 1 for weights of B bits, or 1 for real-valued ones.
      offset: offset that `offset` encoding adds to every weight code: 2^(B-1), or 1 for real-valued weights.
      levels: highest level, 2^p - 1, of every weight slice; 1 for an analogue cell.
      significance: value of one level of every weight slice, in weight codes.
      zero_digits: digits of a weight of zero: the offset of `offset` encoding, slice by slice.
      unit_levels: level of the unit column's cells in every slice: 1 where columns are flipped, which need the plain
        sum of the inputs (ISAAC), otherwise those of a weight of zero (CrossSim).
      input_slices: bits of every input slice; None for an ideal DAC.
      converted_slices: bits of every conversion's input slice, one where all are summed before; None for an ideal DAC.
      input_significance: value of one level of every input slice, in units of the smallest.
      input_top: largest |n| of an input code, 2^m - 1; 1 for an ideal DAC.
      pulse: largest |u| of one input slice, 2^s - 1, which drives a row at full voltage; 1 for an ideal DAC.
      converted_top: largest |u| of one conversion: of an input slice, or of all that are summed before the ADC.
      bounds: largest possible |column sum| of one conversion of every weight slice, for any weights and inputs.
      code_range: lowest and highest code of the ADC; None for an ideal one.
    """

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    polarities: int
    code_scale: float
    offset: float
    levels: tuple[int, ...]
    significance: tuple[float, ...]
    zero_digits: tuple[float, ...]
    unit_levels: tuple[float, ...]
    input_slices: tuple[int, ...] | None
    converted_slices: tuple[int, ...] | None
    input_significance: tuple[float, ...]
    input_top: int
    pulse: int
    converted_top: int
    bounds: tuple[float, ...]
    code_range: tuple[int, int] | None

    @classmethod
    def of(cls, shape: tuple[int, ...], config: CrossbarConfig) -> "Geometry":
        """Return the geometry of a [d_in, d_out] matrix."""
        tile = config.tile
        encoding = config.encoding
        adc = config.adc
        dac = config.dac
        rows = partition(shape[0], tile.rows, tile.partition)
        offset = 2.0 ** ((config.mapping.weight_bits or 1) - 1)
        levels = tuple(2**bits - 1 for bits in config.weight_slices)
        if config.cell.bits is None:
            worth = (1.0 if encoding.kind == "differential" else 2.0,)
            if config.cell.residual:
                assert (
                    config.cell.significance != "auto"
                )  # a configuration has a number
                worth = (float(config.cell.significance), *worth)
            middle = (0.5,)
        else:
            worth = significance(config.weight_slices)
            middle = tuple(
                float(int(offset // weight) & top)
                for weight, top in zip(worth, levels, strict=True)
            )
        zeros = (0.0,) * len(levels)
        zero_digits = middle if encoding.kind == "offset" else zeros
        input_top = 1 if dac is None else 2**dac.magnitude_bits - 1
        pulse = 1 if dac is None else 2 ** dac.slices[0] - 1
        converted_top = input_top if config.converts_sums else pulse
        # A flipped column sums at most half of its levels. Its unit column holds ones, and is not flipped.
        halves, unit = (2, 1.0) if encoding.flip else (1, 0.0)
        driven = max(rows) * converted_top
        code_range = None
        if adc is not None:
            top = 2 ** (adc.full_bits - config.signed_sums) - 1
            code_range = (-top if config.signed_sums else 0, top)
        input_slices = None if dac is None else dac.slices
        converted_slices = input_slices
        if dac is not None and config.converts_sums:
            converted_slices = (dac.magnitude_bits,)
        return cls(
            rows=rows,
            cols=partition(shape[1], tile.cols, tile.partition),
            polarities=2 if encoding.kind == "differential" else 1,
            code_scale=max(1.0, offset - 1),
            offset=offset,
            levels=levels,
            significance=worth,
            zero_digits=zero_digits,
            unit_levels=(1.0,) * len(levels) if encoding.flip else zero_digits,
            input_slices=input_slices,
            converted_slices=converted_slices,
            input_significance=significance(config.input_slices),
            input_top=input_top,
            pulse=pulse,
            converted_top=converted_top,
            bounds=tuple(driven * max(top / halves, unit) for top in levels),
            code_range=code_range,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix: (d_in, d_out)."""
        return sum(self.rows), sum(self.cols)

    @property
    def tallest(self) -> int:
        """Rows of the tallest row tile."""
        return max(self.rows)

    @property
    def cells_in_use(self) -> Bool[np.ndarray, "R C rows cols"]:
        """True for the cells of the arrays that hold a weight."""
        rows = np.asarray(self.rows)
        cols = np.asarray(self.cols)
        row = np.arange(max(rows)) >= max(rows) - rows[:, None]
        col = np.arange(max(cols)) < cols[:, None]
        return row[:, None, :, None] & col[None, :, None, :]


def partition(size: int, limit: int | None, kind: str) -> tuple[int, ...]:
    """Return the lengths of the parts into which arrays of `limit` cut an axis."""
    if limit is None or size <= limit:
        return (size,)
    parts = math.ceil(size / limit)
    step = round(size / parts) if kind == "equal" else limit
    if (
        size - (parts - 1) * step > limit
    ):  # rounding down left more than an array for the last part
        step = math.ceil(size / parts)
    return (*[step] * (parts - 1), size - (parts - 1) * step)


def significance(slices: tuple[int, ...]) -> tuple[float, ...]:
    """Return the value of one level of every slice, in levels of the first."""
    return tuple(2.0**start for start in itertools.accumulate(slices[:-1], initial=0))
