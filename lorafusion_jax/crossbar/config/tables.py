"""YAML and JSON files of settings as plain tables, within bounds on their size and depth."""

import json
import reprlib
from pathlib import Path
from typing import Any

import yaml

_LARGEST = 1 << 20  # bytes
_MOST_VALUES, _DEEPEST = 100_000, 20
_SPELL = reprlib.Repr()
_SPELL.maxlevel, _SPELL.maxstring, _SPELL.maxlong, _SPELL.maxother = 3, 120, 120, 120


def kind_of(path: Path, what: str) -> str:
    """Return `yaml` or `json` by a file's suffix; raises ValueError for another one."""
    kinds = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}
    if path.suffix not in kinds:
        raise ValueError(f"{path}: {what} a file ending in {', '.join(kinds)}")
    return kinds[path.suffix]


def read_table(path: Path, kind: str) -> Any:
    """Return the content of a YAML or JSON file.

    Raises:
      ValueError: the file is larger than 1 MiB, not of its kind, or holds 100,000 values or lists 20 deep; aliases of
        YAML count as often as they occur.
    """
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"{path} has {size:,} bytes: wanted at most {_LARGEST:,}")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if kind == "json" else yaml.load(text, _LOADER)
    except Exception as error:  # YAML tags that do not fit their values raise errors of many kinds
        raise ValueError(f"{path} is not a {kind.upper()} file: {error}") from error
    inside, values = [(found, 0)], 0
    while inside:
        value, depth = inside.pop()
        values += 1
        if depth > _DEEPEST or values > _MOST_VALUES:
            raise ValueError(f"{path} holds over {_MOST_VALUES:,} values, or tables over {_DEEPEST} deep: refused")
        if isinstance(value, dict | list):
            inside += [(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]
    return found


def shown(value: Any) -> str:
    """Return a value of a file as text for a message, shortened."""
    return _SPELL.repr(value)


# The parser in C reads a file of 1 MiB in 1 s, the one in Python in 10 s.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
