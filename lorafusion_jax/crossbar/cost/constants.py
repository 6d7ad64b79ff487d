"""The physical constants of the cost model: `constants.yaml` next to this file, and files that replace it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from ...support.text import shown
from ...support.writing import write_text
from ..config.tables import kind_of, read_table
from ..mapping.adc.architectures import ARCHITECTURES
from .ranges import Constant, Range

Level = Literal["low", "typical", "high"]

_WHAT = "constants are"
_FIELDS = ("unit", "low", "typical", "high", "source")


@dataclasses.dataclass(frozen=True)
class Constants:
    """All constants, by name; those of an ADC architecture that the table lacks have their defaults."""

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


_DEFAULTS = read_table(Path(__file__).with_name("constants.yaml"), "yaml")
CONSTANTS = Constants(MappingProxyType({name: Constant(**fields) for name, fields in _DEFAULTS.items()}))
"""The default table."""


def save_constants(path: Path, constants: Constants = CONSTANTS) -> None:
    """Write a table to a `.yaml`, `.yml` or `.json` file, which can be edited and read by `load_constants`."""
    write = json.dumps if kind_of(path, _WHAT) == "json" else yaml.safe_dump
    layout: dict[str, Any] = {"indent": 2} if kind_of(path, _WHAT) == "json" else {"sort_keys": False, "width": 120}
    table = {name: {field: getattr(c, field) for field in _FIELDS} for name, c in constants.table.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
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
        raise ValueError(f"{path}: no such file of constants: make one with save_constants")
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
