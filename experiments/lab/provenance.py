"""Provenance of results: differences of configurations, data, versions and devices."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorafusion_jax.report import Column, Row, Table, shots_name

_MOST_VALUES = 6  # of one setting that are listed


def config_tables(rows: Sequence[Row]) -> list[Table]:
    """Return the settings in which methods differ, a line each, and those that all rows share."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for setting, value in _flat(row["config"]):
            values = found.setdefault(setting, {}).setdefault(row["method"], [])
            if value not in values:
                values.append(value)
    everywhere, differing = [], []
    for setting, by_method in found.items():
        values = {value for values in by_method.values() for value in values}
        if len(values) == 1 and len(by_method) == len(methods):
            everywhere.append([setting, *values])
        else:
            differing.append([setting, *(_listed(by_method.get(method)) for method in methods)])
    names = [Column("setting", "text"), *(Column(method, "text") for method in methods)]
    return [
        Table(
            "Settings that differ; several values of one method are those of its tasks, shots and seeds",
            names,
            differing,
        ),
        Table("Settings that all results share", [Column("setting", "text"), Column("value", "text")], everywhere),
    ]


def origin_tables(rows: Sequence[Row]) -> list[Table]:
    """Return the data of each task, and versions and devices with what was run on them."""
    data = {}
    for row in rows:
        data.setdefault((row["task"], row["data_sha256"]), len(row["correct"]))
    hashes = [[task, items, digest] for (task, digest), items in data.items()]
    places: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        places.setdefault((row["device"], str(row["cores"]), versions), []).append(row)
    devices = [[device, cores, versions, len(there)] for (device, cores, versions), there in places.items()]
    groups = {shots: [row for row in rows if row["shots"] == shots] for shots in _unique(rows, "shots")}
    seeds = [
        [
            method,
            shots_name(shots),
            ", ".join(str(seed) for seed in sorted(_unique(of, "seed"))),
            len(_unique(of, "task")),
        ]
        for shots, there in groups.items()
        for method in _unique(there, "method")
        for of in [[row for row in there if row["method"] == method]]
    ]
    text, count = "text", "count"
    return [
        Table(
            "Data",
            [Column("task", text), Column("test rows", count), Column("sha256 of the task's rows", text)],
            hashes,
        ),
        Table(
            "Devices and versions",
            [Column("device", text), Column("cores", text), Column("versions", text), Column("results", count)],
            devices,
        ),
        Table(
            "Seeds",
            [Column("method", text), Column("shots", text), Column("seeds", text), Column("tasks", count)],
            seeds,
        ),
    ]


def _unique(rows: Iterable[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield settings with dotted names, and their values as JSON without quotes."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _listed(values: Sequence[str] | None) -> str | None:
    if values is None:
        return None
    more = f" and {len(values) - _MOST_VALUES} more" if len(values) > _MOST_VALUES else ""
    return ", ".join(values[:_MOST_VALUES]) + more
