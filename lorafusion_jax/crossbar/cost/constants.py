"""The physical constants of the cost model: `constants.yaml` next to this file, and files that replace some of them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NotRequired, TypedDict

from ...support.reading import decode_as
from ..config.files import read_table
from ..mapping.adc.architectures import ARCHITECTURES
from .ranges import Constant, Range

Level = Literal["low", "typical", "high"]

_FILE = Path(__file__).with_name("constants.yaml")


class _Entry(TypedDict):
    """A constant in a file."""

    unit: str
    low: float
    typical: float
    high: float
    source: str
    meaning: NotRequired[str]


@dataclasses.dataclass(frozen=True)
class Constants:
    """All constants, by name; those of an ADC architecture that the table lacks have their defaults."""

    table: Mapping[str, Constant]

    def __getitem__(self, name: str) -> Range:
        """Return a constant in joules, seconds or as a pure number."""
        return (
            self.table[name] if name in self.table else of_architectures()[name]
        ).range

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


_DEFAULTS = read_table(_FILE, "constants are")
CONSTANTS = Constants(
    MappingProxyType({name: Constant(**fields) for name, fields in _DEFAULTS.items()})
)
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
        entry = decode_as(fields, _Entry, f"{path}: {name}", fix=fix)
        if name not in all_constants:
            raise ValueError(
                f"{path}: {name!r} unknown: choose from {', '.join(all_constants)}"
            )
        if entry["unit"] != (unit := all_constants[name].unit):
            raise ValueError(
                f"{path}: {name} is in {entry['unit']!r}: give it in {unit!r}"
            )
        low = entry["low"]
        typical = entry["typical"]
        high = entry["high"]
        if not 0 < low <= typical <= high < float("inf"):
            raise ValueError(
                f"{path}: {name} is {low}, {typical}, {high}: give 0 < low <= typical <= high, all finite"
            )
        table[name] = dataclasses.replace(
            all_constants[name],
            low=low,
            typical=typical,
            high=high,
            source=entry["source"],
        )
    return Constants(MappingProxyType(table))
