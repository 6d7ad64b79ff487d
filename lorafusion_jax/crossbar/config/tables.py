"""YAML and JSON files of settings as plain tables."""

import json
from pathlib import Path
from typing import Any

import yaml


def kind_of(path: Path, purpose: str) -> str:
    """Return `yaml` or `json` by a file's suffix; raises ValueError for another one."""
    kinds = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}
    if path.suffix not in kinds:
        raise ValueError(f"{path}: {purpose} a file ending in {', '.join(kinds)}")
    return kinds[path.suffix]


def read_table(path: Path, kind: str) -> Any:
    """Return the content of a YAML or JSON file; raises a ValueError for one that is not of its kind."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if kind == "json" else yaml.safe_load(text)
    except (
        Exception
    ) as error:  # YAML tags that do not fit their values raise errors of many kinds
        raise ValueError(f"{path} cannot be read as {kind.upper()}: {error}") from error
