"""Provenance of results: settings of the methods, data, versions and devices."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .formats import Column, Table
from .scores import Row

_MOST_VALUES = 6  # of one setting that are listed


def provenance(rows: Sequence[Row]) -> list[Table]:
    """Return tables for the end of a report: settings that differ, shared settings, data, and devices with versions."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found: dict[str, dict[str, dict[str, None]]] = {}
    for row in rows:
        for setting, value in _flat(row["config"]):
            found.setdefault(setting, {}).setdefault(row["method"], {})[value] = None
    shared, differing = [], []
    for setting, by_method in found.items():
        values = {value for values in by_method.values() for value in values}
        if len(values) == 1 and len(by_method) == len(methods):
            shared.append([setting, *values])
        else:
            differing.append([setting, *(_listed(by_method.get(method)) for method in methods)])
    data = {(row["task"], row["data_sha256"]): len(row["correct"]) for row in rows}
    places: dict[tuple[str, int, str], int] = {}
    for row in rows:
        place = row["device"], row["cores"], ", ".join(f"{name} {of}" for name, of in row["versions"].items())
        places[place] = places.get(place, 0) + 1
    return [
        Table(
            "Settings that differ; several values of one method are those of its tasks, shots and seeds",
            _columns("setting", *methods),
            differing,
        ),
        Table("Settings that all results share", _columns("setting", "value"), shared),
        Table(
            "Data",
            [*_columns("task", "sha256 of the task's rows"), Column("test rows", "count")],
            [[*of, items] for of, items in data.items()],
        ),
        Table(
            "Devices and versions",
            [*_columns("device", "cores", "versions"), Column("results", "count")],
            [[*place, count] for place, count in places.items()],
        ),
    ]


def _columns(*names: str) -> list[Column]:
    return [Column(name, "text") for name in names]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield settings with dotted names, and their values as JSON without quotes."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _listed(values: Iterable[str] | None) -> str | None:
    if values is None:
        return None
    first, *more = [*values]
    shown = ", ".join([first, *more][:_MOST_VALUES])
    return shown if len(more) < _MOST_VALUES else f"{shown} and {len(more) + 1 - _MOST_VALUES} more"
