"""Grids of configurations: all combinations of some fields' values."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ...support.reading import error_context
from .files import config_fields, config_from
from .schema import CrossbarConfig


def grid(
    base: CrossbarConfig, vary: Mapping[str, Sequence[Any]]
) -> dict[str, CrossbarConfig]:
    """Return all combinations of some fields' values in a configuration, by texts such as `adc.bits=5 tile.rows=64`.

    Args:
      base: configuration with all other fields; a part that is None gets its defaults if one of its fields is varied.
      vary: values by the path of a field, as a file of a configuration has them. An integer for `cell.bits` lists the
        bits of its slices, least significant first: 2221.

    Raises:
      ValueError: a field does not exist, or a value or a combination is not valid.
    """
    configs = {}
    for values in itertools.product(*vary.values()):
        fields = config_fields(base)
        for name, value in zip(vary, values, strict=True):
            *parts, last = name.split(".")
            table: Any = fields
            for part in parts:
                table[part] = table.get(part) or {}
                table = table[part]
                if not isinstance(table, dict):
                    raise ValueError(f"{name} is unknown: {part} has no fields")
            digits = name == "cell.bits" and isinstance(value, int)
            table[last] = [*map(int, str(value))] if digits else value
        label = " ".join(
            f"{name}={value if isinstance(value, int | str) else json.dumps(value)}"
            for name, value in zip(vary, values, strict=True)
        )
        with error_context(label or "the configuration"):
            configs[label] = config_from(fields)
    return configs


def parse_vary(arguments: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values by field of texts such as `adc.bits=4,5,6`; raises a ValueError for other texts."""
    vary = {}
    for argument in arguments:
        name, _, values = argument.partition("=")
        try:
            vary[name] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            vary[name] = None
        if not vary[name]:
            raise ValueError(
                f"{argument!r}: give a field and its values, as in adc.bits=4,5,6"
            )
    return vary


def usual_variations(base: CrossbarConfig) -> dict[str, list[Any]]:
    """Return the fields and values that are explored by default: cells of 1, 2 and 4 bits, ADCs, rows of arrays."""
    vary: dict[str, list[Any]] = {"adc.bits": [5, 6, 8], "tile.rows": [64, 128, 256]}
    stored = base.stored_bits
    if stored is None:
        return vary
    cells = [
        [min(width, stored - start) for start in range(0, stored, width)]
        for width in (1, 2, 4)
    ]
    return {"cell.bits": cells} | vary
