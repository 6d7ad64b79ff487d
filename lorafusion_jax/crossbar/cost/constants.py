"""The physical constants of the cost model: one table of units, ranges and sources, and files that replace it.

Sources: [S] read in the named source, [R] recalled from the literature, [A] assumed here.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from ..config.tables import kind_of, read_table, shown, write_text
from ..mapping.adc import ARCHITECTURES
from .ranges import Constant, Range

Level = Literal["low", "typical", "high"]

_WHAT = "constants are"
_FIELDS = ("unit", "low", "typical", "high", "source")


@dataclasses.dataclass(frozen=True)
class Constants:
    """All constants, by name.

    Attributes:
      table: the constants; those of an ADC architecture that it lacks have their defaults.
    """

    table: Mapping[str, Constant]

    def __getitem__(self, name: str) -> Range:
        """Return a constant in joules, seconds or as a pure number."""
        return (self.table[name] if name in self.table else of_architectures()[name]).range

    def pinned(self, level: Level, *names: str) -> "Constants":
        """Return the constants with the named ones (all without names) fixed at one of their three values."""
        table = of_architectures() | dict(self.table)

        def pin(constant: Constant) -> Constant:
            value = getattr(constant, level)
            return dataclasses.replace(constant, low=value, typical=value, high=value)

        return Constants(MappingProxyType({n: pin(c) if n in (names or table) else c for n, c in table.items()}))


def of_architectures() -> dict[str, Constant]:
    """Return the constants that ADC architectures bring along."""
    return {name: constant for each in ARCHITECTURES.values() for name, constant in each.constants.items()}


CONSTANTS = Constants(
    MappingProxyType(
        {
            "cell_write_energy": Constant(
                "pJ", 1.3, 41.0, 104.0,
                "[S] puma-simulator: 676 nJ for 128 x 128 cells, which the file also divides by 32 (low); high: [S] "
                "CiMLoop rram_wan (NeuRRAM); between them: [S] CiMLoop rram_isaac, 8 to 80 pJ",
                "of one cell, all pulses and verifying reads included",
            ),
            "write_pulses": Constant(
                "1", 1.0, 8.52, 32.0,
                "low: [A] a write without verify; [R] NeuRRAM's mean; high: [A] where WriteVerify gives up",
                "write-verify pulses of one cell; each counts as a cycle of endurance",
            ),
            "row_write_time": Constant(
                "us", 0.04, 2.74, 8.52,
                "low: [S] CiMLoop rram_isaac, one pulse; [S] puma-simulator: 351 us for 128 rows; high: [S] CiMLoop "
                "rram_wan, all pulses of a cell",
                "of one row of an array, whose cells are written at once",
            ),
            "arrays_written_at_once": Constant(
                "1", 1.0, 8.0, 128.0,
                "[A] bounded by the current that a chip can supply; typical: the arrays of one unit of ISAAC [R]",
                "each at one of its rows",
            ),
            "endurance": Constant(
                "1", 1e4, 1e6, 1e10,
                "low: [R] embedded parts; [S] Huang et al., abstract, 4-level HfOx; high: [R] best devices",
                "cycles that a cell lives",
            ),
            "cell_read_energy": Constant(
                "fJ", 1.8, 2.0, 20.0,
                "low: [S] puma-simulator: 30 pJ for 128 x 128 cells; [S] CiMLoop rram_wan; high: [S] CiMLoop "
                "rram_isaac, 8 to 20 fJ",
                "of one cell and input slice",
            ),
            "array_read_time": Constant(
                "ns", 14.6, 100.0, 700.0,
                "low: [R] Xue et al., ISSCC 2019, a 1 Mb macro; [S] puma-simulator; high: [R] NeuRRAM, 2.1 us for 3 "
                "slices",
                "of one input slice, all columns",
            ),
            "dac_energy": Constant(
                "pJ", 0.057, 0.39, 2.73,
                "[S] puma-simulator: 3.9 uW, for the three times of array_read_time",
                "of driving one row with one bit; 2^bits - 1 times that for a wider slice",
            ),
            "adc_energy": Constant(
                "pJ", 0.5, 1.56, 5.0,
                "[S] puma-simulator, after ISAAC: 2 mW, 128 columns in 100 ns; low, high: [R] 2 and 20 fJ a step",
                "of one conversion of 8 bits",
            ),
            "adc_growth": Constant(
                "1", 1.27, 2.0, 4.0,
                "low: [S] puma-simulator: power and time in proportion to the bits, so (9/8)^2; [S] Walden: "
                "E = FoM 2^ENOB; high: [R] where noise limits",
                "what one more bit multiplies a conversion's energy by",
            ),
            "adc_time": Constant(
                "ns", 0.78, 0.78, 10.0,
                "[S] puma-simulator: 128 columns in 100 ns; high: [A] 100 million conversions a second",
                "of one conversion",
            ),
            "columns_per_adc": Constant(
                "1", 8.0, 128.0, 128.0,
                "[S] puma-simulator: one ADC an array; low: [A]",
                "columns that take turns at one ADC",
            ),
            "add_energy": Constant(
                "pJ", 0.05, 0.1, 0.9,
                "[R] Horowitz, 45 nm: 16- and 32-bit integers; high: [S] the same via PMC8934428: float32",
                "of one addition of shift-and-add, over row tiles, or of an offset",
            ),
            "mac_energy": Constant(
                "pJ", 0.32, 4.6, 4.6,
                "[S] Horowitz via PMC8934428: float32 at 45 nm, 3.7 + 0.9; low: [R] Jouppi et al., ISCA 2021: bfloat16 "
                "at 7 nm",
                "of one digital multiply-add, without memory",
            ),
            "mac_time": Constant(
                "ns", 0.001, 0.01, 0.1,
                "[A] a digital unit of 1000, 100 or 10 lanes at 1 GHz",
                "of one digital multiply-add, all lanes working",
            ),
            "word_energy": Constant(
                "pJ", 0.57, 2.15, 5.0,
                "low: [S] puma-simulator, 2 kB; [S] the same, eDRAM, 17.2 pJ for 256 bits; high: [S] Horowitz via "
                "PMC8934428, 8 kB, 10 pJ for 64 bits",
                "of reading or writing 32 bits of on-chip memory",
            ),
            "words_per_mac": Constant(
                "1", 0.016, 0.125, 2.0,
                "[A] operands shared by 128 x 128, 16 x 16 or no multipliers",
                "memory accesses for each multiply-add of a digital matrix product in training",
            ),
        }
    )
)  # fmt: skip
"""The default table."""


def save_constants(path: Path, constants: Constants = CONSTANTS) -> None:
    """Write a table to a `.yaml`, `.yml` or `.json` file, which can be edited and read by `load_constants`."""
    write = json.dumps if kind_of(path, _WHAT) == "json" else yaml.safe_dump
    layout: dict[str, Any] = {"indent": 2} if kind_of(path, _WHAT) == "json" else {"sort_keys": False, "width": 120}
    table = {name: {field: getattr(c, field) for field in _FIELDS} for name, c in constants.table.items()}
    write_text(path, write(table, **layout).rstrip() + "\n")


def load_constants(path: Path) -> Constants:
    """Return the table in a file that `save_constants` wrote: every constant with unit, three values and source.

    Constants of ADC architectures may be missing, and then have their defaults.

    Raises:
      ValueError: the file is missing or cannot be read, a constant is missing or unknown or has another unit, a value
        is not a positive number, or values do not rise.
    """
    kind = kind_of(path, _WHAT)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of constants")
    found = read_table(path, kind)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {shown(found)}: give a table of constants by name")
    known = {**CONSTANTS.table, **of_architectures()}
    if missing := [name for name in CONSTANTS.table if name not in found]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: give every one of {', '.join(CONSTANTS.table)}")
    if unknown := [name for name in found if name not in known]:
        raise ValueError(f"{path}: {shown(unknown)} unknown: choose from {', '.join(known)}")
    return Constants(
        MappingProxyType({name: _constant(found[name], name, c, path) for name, c in known.items() if name in found})
    )


def _constant(fields: Any, name: str, default: Constant, path: Path) -> Constant:
    if not isinstance(fields, dict) or set(fields) != set(_FIELDS):
        raise ValueError(f"{path}: {name} is {shown(fields)}: give a table of exactly {', '.join(_FIELDS)}")
    if str(fields["unit"]) != default.unit:
        raise ValueError(f"{path}: {name} is in {shown(fields['unit'])}: give it in {default.unit!r}")
    values = [fields[level] for level in ("low", "typical", "high")]
    for value in values:
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            hint = "; YAML takes 1e4 for a text: write 1.0e+4" if isinstance(value, str) else ""
            raise ValueError(f"{path}: {name} has the value {shown(value)}: give a positive number{hint}")
    if values != sorted(values):
        raise ValueError(f"{path}: {name} is {values}: give low <= typical <= high")
    if not isinstance(fields["source"], str) or not fields["source"].strip():
        raise ValueError(f"{path}: {name} has the source {shown(fields['source'])}: name where the values are from")
    low, typical, high = map(float, values)
    return dataclasses.replace(default, low=low, typical=typical, high=high, source=fields["source"])
