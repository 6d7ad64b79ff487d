"""Counts of a matrix on a crossbar (arrays, cells) and of one read of it, by the simulator's own mapping."""

import dataclasses

from ..config.schema import CrossbarConfig
from ..mapping.geometry import Geometry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of one matrix, or of several; counts can be added and multiplied by a number of reads.

    Attributes:
      arrays: tiles x weight slices x polarities.
      cells: cells that hold a weight or a unit column; unused cells of an array are neither written nor read.
      rows: rows in use of all arrays; each is driven at a read, and its cells are written at once.
      tallest: rows in use of the tallest array; the largest one, not the sum, of several matrices.
      conversions: conversions of the ADCs for one input vector.
      additions: additions for one input vector after the conversions: shift-and-add, and removal of unit columns or
        offsets.
      sums: additions over row tiles.
      inputs: numbers that come in.
      outputs: numbers that go out, each scaled by one multiplication.
    """

    arrays: int = 0
    cells: int = 0
    rows: int = 0
    tallest: int = 0
    conversions: int = 0
    additions: int = 0
    sums: int = 0
    inputs: int = 0
    outputs: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        sums = {name: count + getattr(other, name) for name, count in vars(self).items()}
        return Counts(**sums | {"tallest": max(self.tallest, other.tallest)})

    def __mul__(self, times: int) -> "Counts":
        return Counts(**{name: count * times for name, count in vars(self).items()} | {"tallest": self.tallest})


def counts(shape: tuple[int, int], config: CrossbarConfig) -> Counts:
    """Return the counts of a [d_in, d_out] matrix; there are no conversions without an ADC."""
    d_in, d_out = shape
    geometry = Geometry.of(shape, config)
    rows, cols = geometry.rows, geometry.cols
    slices = len(config.weight_slices)
    each = slices * geometry.polarities
    columns = d_out + (len(cols) if config.encoding.unit_column else 0)

    conversions = additions = 0
    if config.adc is not None:
        times = 1 if config.converts_sums else len(config.input_slices)
        reads = times * slices * len(rows)
        conversions = reads * columns * (2 if config.converts_each else 1)
        # Every code is shifted and added; a unit column's code is subtracted from those of its array.
        additions = conversions + (reads * d_out if config.encoding.unit_column else 0)
    if config.encoding.kind == "offset" and not config.encoding.unit_column:
        additions += d_in  # the sum of the inputs, which the digital offset multiplies
    return Counts(
        arrays=len(rows) * len(cols) * each,
        cells=d_in * columns * each,
        rows=d_in * len(cols) * each,
        tallest=geometry.tallest,
        conversions=conversions,
        additions=additions,
        sums=(len(rows) - 1) * d_out,
        inputs=d_in,
        outputs=d_out,
    )
