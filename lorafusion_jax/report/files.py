"""Files that are whole or not there: written beside their target and then renamed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let a function write a file under another name, and rename it once it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    writer(partial)
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file that is whole or not there."""
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))
