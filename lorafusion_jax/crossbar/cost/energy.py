"""Counts of matrices on a crossbar; energy, time and wear of writing them, and energy and latency of reading them.

Energies are linear in the counts of `counts`, so that matrices and layers add up. Joules and seconds, as ranges.
docs/concepts/cost.md has the formulas, and lists effects that are not modelled.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from ...support.reading import decode_as
from ..config.files import read_table
from ..config.schema import ADC, DAC, CrossbarConfig
from ..devices.device import Readback
from ..mapping.adc.architectures import ARCHITECTURES
from ..mapping.geometry import Geometry
from ..preparation.transform import transform_operations
from .ranges import Constant, Range, longest, total

Level = Literal["low", "typical", "high"]

_FILE = Path(__file__).with_name("constants.yaml")


@dataclasses.dataclass(frozen=True)
class Constants:
    """All constants, by name; those of an ADC architecture that the table lacks have their defaults."""

    table: Mapping[str, Constant]

    def __getitem__(self, name: str) -> Range:
        """Return a constant in joules, seconds or as a pure number."""
        return (of_architectures() | dict(self.table))[name].range

    def pinned(self, level: Level, *names: str) -> "Constants":
        """Return the constants with the named ones (all without names) fixed at one of their three values."""
        table = of_architectures() | dict(self.table)

        def pin(constant: Constant) -> Constant:
            value = getattr(constant, level)
            return dataclasses.replace(constant, low=value, typical=value, high=value)

        return Constants(
            MappingProxyType(
                {n: pin(c) if n in (names or table) else c for n, c in table.items()}
            )
        )


def of_architectures() -> dict[str, Constant]:
    """Return the constants that ADC architectures bring along."""
    return {
        name: constant
        for architecture in ARCHITECTURES.values()
        for name, constant in architecture.constants.items()
    }


_DEFAULTS = decode_as(read_table(_FILE, "constants are"), dict[str, Constant], _FILE)
CONSTANTS = Constants(MappingProxyType(_DEFAULTS))
"""The default table."""


def load_constants(path: Path) -> Constants:
    """Return the default table, in which a `.yaml`, `.yml` or `.json` file replaces the constants that it has.

    The file has a table for each of them, as `constants.yaml` next to this module: unit, three values and source.

    Raises:
      ValueError: the file is missing or cannot be read, a constant is unknown or has another unit, a value is not a
        positive number, or values do not rise.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file of constants: write one like {_FILE}, with those that differ"
        )
    fix = "change it (YAML takes 1e4 for a text: write 1.0e+4)"
    entries = decode_as(
        read_table(path, "constants are"), dict[str, Any], path, fix=fix
    )
    all_constants = {**CONSTANTS.table, **of_architectures()}
    table = dict(CONSTANTS.table)
    for name, fields in entries.items():
        constant = decode_as(fields, Constant, f"{path}: {name}", fix=fix)
        if name not in all_constants:
            raise ValueError(
                f"{path}: {name!r} unknown: choose from {', '.join(all_constants)}"
            )
        default = all_constants[name]
        if constant.unit != default.unit:
            raise ValueError(
                f"{path}: {name} is in {constant.unit!r}: give it in {default.unit!r}"
            )
        if not 0 < constant.low <= constant.typical <= constant.high < math.inf:
            raise ValueError(
                f"{path}: {name} is {constant.low}, {constant.typical}, {constant.high}: give 0 < low <= typical <= "
                "high, all finite"
            )
        table[name] = dataclasses.replace(constant, meaning=default.meaning)
    return Constants(MappingProxyType(table))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of one matrix, or of several; counts can be added and multiplied by a number of reads.

    Attributes:
      arrays: tiles x weight slices x polarities.
      cells: cells that hold a weight or a unit column; unused cells of an array are neither written nor read.
      rows: rows in use of all arrays; each is driven at a read, and its cells are written at once.
      tallest: rows in use of the tallest array.
      conversions: conversions of the ADCs for one input vector.
      additions: additions for one input vector: shift-and-add, and removal of unit columns or offsets.
      sums: additions over row tiles.
      inputs: numbers that come in.
      outputs: numbers that go out, each scaled by one multiplication.
      transforms: additions of the transform of one input vector.
      factors: multiplications of one input vector before the DACs.
      readbacks: readings of single cells between the slices of residual writing; those of write-verify are in the
        constants of a pulse.
      wait: seconds between writing and reading them, for all matrices together.
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
    transforms: int = 0
    factors: int = 0
    readbacks: int = 0
    wait: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        sums = {
            name: count + getattr(other, name) for name, count in vars(self).items()
        }
        tallest = max(self.tallest, other.tallest)
        return Counts(**sums | {"tallest": tallest, "wait": max(self.wait, other.wait)})

    def __mul__(self, times: int) -> "Counts":
        return Counts(
            **{name: count * times for name, count in vars(self).items()}
            | {"tallest": self.tallest, "wait": self.wait}
        )


def counts(
    shape: tuple[int, ...], config: CrossbarConfig, *, prepares: bool = True
) -> Counts:
    """Return the counts of a [d_in, d_out] matrix; there are no conversions without an ADC.

    `prepares` counts the preparation of its inputs (see `prepare`), once for all matrices that share them.
    """
    geometry = geometry_of(shape, config)
    d_in, d_out = shape
    rows = geometry.rows
    cols = geometry.cols
    slices = len(config.weight_slices)
    arrays_per_tile = slices * geometry.polarities
    columns = d_out + (len(cols) if config.encoding.unit_column else 0)
    conversions = additions = 0
    if config.adc is not None:
        if isinstance(config.adc.bits, tuple):
            pairs = int(np.count_nonzero(config.adc.bits))
        else:
            pairs = slices * (1 if config.converts_sums else len(config.input_slices))
        reads = pairs * len(rows)
        conversions = reads * columns * (2 if config.converts_each else 1)
        # Every code is shifted and added; a unit column's code is subtracted from those of its array.
        additions = conversions + (reads * d_out if config.encoding.unit_column else 0)
    if config.encoding.kind == "offset" and not config.encoding.unit_column:
        additions += d_in  # the sum of the inputs, which the digital offset multiplies
    cells = d_in * columns * arrays_per_tile
    readbacks = 0
    wait = 0.0
    if config.cell.residual:
        readback = config.device.readback or Readback()
        readbacks = cells // slices * (slices - 1) * readback.repeats
        if config.device.readback and config.device.time is not None:
            wait = (slices - 1) * float(np.max(np.asarray(readback.after)))
    preparing_counts = preparing(d_in, config) if prepares else Counts()
    return preparing_counts + Counts(
        arrays=len(rows) * len(cols) * arrays_per_tile,
        cells=cells,
        readbacks=readbacks,
        wait=wait,
        rows=d_in * len(cols) * arrays_per_tile,
        tallest=geometry.tallest,
        conversions=conversions,
        additions=additions,
        sums=(len(rows) - 1) * d_out,
        inputs=d_in,
        outputs=d_out,
    )


def preparing(d_in: int, config: CrossbarConfig) -> Counts:
    """Return the counts of preparing one input vector."""
    additions, multiplications = (
        transform_operations(d_in) if config.mapping.transform == "hadamard" else (0, 0)
    )
    return Counts(
        transforms=additions,
        factors=multiplications + (d_in if config.mapping.factors else 0),
    )


class WriteCost(NamedTuple):
    """Cost of writing cells, in joules and seconds.

    Rows of an array are written one after the other, the cells of a row at once. Each cell uses `cycles` of its
    endurance, which is used up after `until_worn` such writes (None without cells).
    """

    cells: int
    pulses: Range
    energy: Range
    time: Range
    cycles: Range
    until_worn: Range | None
    readbacks: int = 0


class ReadEnergy(NamedTuple):
    """Joules of reads, by component."""

    array: Range
    dac: Range
    adc: Range
    shift_add: Range
    digital: Range

    @property
    def total(self) -> Range:
        """All components together."""
        return total(self)


def write_cost(
    cells_written: Counts, constants: Constants = CONSTANTS, *, passes: int = 1
) -> WriteCost:
    """Return the cost of writing each cell of matrices `passes` times."""
    cycles = constants["write_pulses"] * (passes if cells_written.cells else 0)
    cells = cells_written.cells * passes
    turns = Range.of(cells_written.rows) / constants["arrays_written_at_once"]
    in_turn = longest([turns, Range.of(cells_written.tallest)])
    readbacks = cells_written.readbacks * passes
    reading = constants["cell_read_energy"] + constants["adc_energy"]
    row_time = constants["row_write_time"]
    if readbacks:
        row_read_time = (
            constants["array_read_time"]
            + constants["adc_time"] * constants["columns_per_adc"]
        )
        row_time = row_time + row_read_time * (readbacks / cells)
    return WriteCost(
        cells=cells,
        readbacks=readbacks,
        pulses=constants["write_pulses"] * cells,
        energy=constants["cell_write_energy"] * cells + reading * readbacks,
        time=row_time * in_turn * passes + Range.of(cells_written.wait * passes),
        cycles=cycles,
        until_worn=constants["endurance"] / cycles if cells else None,
    )


def read_energy(
    reads: Counts, config: CrossbarConfig, constants: Constants = CONSTANTS
) -> ReadEnergy:
    """Return the energy of reads, given counts of the matrices, each multiplied by its number of input vectors.

    Raises a ValueError for an ideal DAC or ADC, which has no energy.
    """
    dac, adc = _converters(config)
    drive = sum(2**bits - 1 for bits in dac.slices)
    conversion = conversion_energy(adc, constants)
    return ReadEnergy(
        array=constants["cell_read_energy"] * (reads.cells * len(dac.slices)),
        dac=constants["dac_energy"] * (reads.rows * drive),
        adc=conversion * reads.conversions,
        shift_add=constants["add_energy"] * reads.additions,
        digital=constants["add_energy"] * (reads.sums + reads.transforms)
        + constants["mac_energy"] * (reads.outputs + reads.factors)
        + constants["word_energy"] * (reads.inputs + reads.outputs),
    )


# One converter, stopped early; one of the most bits of each weight slice; and that one, stopped early.
ADCModel = Literal["stopped", "designed", "both"]


def conversion_energy(
    adc: ADC, constants: Constants = CONSTANTS, model: ADCModel = "stopped"
) -> Range:
    """Return the mean joules of a conversion; those that a table of bits leaves out do not count."""
    energy = ARCHITECTURES[adc.architecture].energy
    if isinstance(adc.bits, int):
        return energy(adc.bits, constants)
    energies = []
    for row in adc.bits:
        most = adc.full_bits if model == "stopped" else max(row)
        for bits in filter(None, row):
            share = 1.0 if model == "designed" else bits / most
            working = constants["adc_fixed_share"] * (1 - share) + Range.of(share)
            energies.append(energy(most, constants) * working)
    return total(energies) / len(energies)


def read_latency(
    shape: tuple[int, ...], config: CrossbarConfig, constants: Constants = CONSTANTS
) -> Range:
    """Return the seconds of one matrix-vector product; all arrays work at once, each with its own ADCs.

    While the sums of an input slice are converted, the next slice is read; `adc.convert="sum"` waits for the last one.
    Conversions that are stopped or left out take the time of others.
    """
    dac, adc = _converters(config)
    columns = max(geometry_of(shape, config).cols) + config.encoding.unit_column
    conversion = ARCHITECTURES[adc.architecture].time(
        adc.full_bits, columns, constants
    ) * (2 if config.converts_each else 1)
    read = constants["array_read_time"]
    slices = len(dac.slices)
    if adc.convert == "sum":
        return read * slices + conversion
    return longest([read, conversion]) * slices


def geometry_of(shape: Any, config: CrossbarConfig) -> Geometry:
    """Return the geometry of a [d_in, d_out] matrix; raises a ValueError for a shape that no matrix has."""
    sizes = shape if isinstance(shape, tuple | list) and len(shape) == 2 else (0,)
    if not all(isinstance(size, int | np.integer) and size > 0 for size in sizes):
        raise ValueError(
            f"a matrix of shape {shape}: give two whole numbers above 0, (d_in, d_out)"
        )
    return Geometry.of(tuple(sizes), config)


def _converters(config: CrossbarConfig) -> tuple[DAC, ADC]:
    if config.dac is None or config.adc is None:
        ideal = "dac" if config.dac is None else "adc"
        raise ValueError(
            f"{ideal} = None is an ideal converter, which has no energy: give one with bits"
        )
    return config.dac, config.adc
