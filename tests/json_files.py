"""JSON files of tests."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Read a file."""
    return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    """Write a file."""
    path.write_text(json.dumps(content))


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write a file with one row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_json(path: Path, fields: dict[str, Any]) -> None:
    """Replace fields of a file, or add them."""
    write_json(path, read_json(path) | fields)
