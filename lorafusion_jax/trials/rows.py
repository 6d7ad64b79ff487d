"""Rows of a results file: JSON lines, one for each task, method, number of shots and seed, that only ever grows."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from ..report import key, name
from ..support.reading import read_lines, structured
from .arms import Shots
from .cells import append_lines

Key = tuple[str, str, str, int]

_Name = Annotated[str, msgspec.Meta(pattern=r"\S", description="a name")]
_Count = Annotated[int, msgspec.Meta(ge=0, description="a count")]
_Marks = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[01]+\Z", description="a 0 or 1 for each of at least one test row"
    ),
]
_Digest = Annotated[
    str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z", description="64 hexadecimal digits")
]


class Result(TypedDict):
    """The result of one method on one task with one seed; `correct` has a character for every test row, in order."""

    task: _Name
    method: _Name
    shots: Shots
    seed: _Count
    exact_match: float  # percent, of `correct`
    option_accuracy: float | None  # percent, of `option_correct`
    loss: float | None  # null also where it was not finite
    correct: _Marks
    option_correct: _Marks | None
    trainable: _Count
    steps: _Count
    forward_rows: _Count  # rows passed forward while adapting
    backward_rows: _Count
    seconds: Annotated[float, msgspec.Meta(ge=0, description="seconds")]
    config: dict[str, Any]
    data_sha256: _Digest  # of the task's rows
    versions: dict[str, str]
    device: _Name
    cores: _Count


def read_rows(path: Path) -> list[Result]:
    """Return the rows of a file, without a last line that was cut off; ValueError for a line that is not a row."""
    return [
        _checked(row, f"{path}, line {n}")
        for n, row in enumerate(read_lines(path, dict[str, Any]), start=1)
    ]


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a file, which is made if it does not exist, and return when they are on disk.

    Processes that append at the same time wait for each other. Only a last line that was cut off is removed. A loss
    that is not finite is written as null.

    Raises:
      ValueError: a row lacks a key or has a wrong value, or the file is a link; nothing is written.
      WriteError: the disk is full, read-only or gone, or has no locks.
    """
    append_lines(
        path,
        [
            _whole(row, f"row {n} of {len(rows)} to append")
            for n, row in enumerate(rows, start=1)
        ],
    )


def merge(files: Sequence[Path]) -> list[Result]:
    """Return the rows of several files; a row that occurs again, identical, counts once.

    Rows of one task with different data, or two different results of one key, are a ValueError.
    """
    merged: dict[Key, tuple[Result, Path]] = {}
    hashes: dict[str, tuple[str, Path]] = {}
    for path in files:
        for row in read_rows(path):
            first, origin = hashes.setdefault(row["task"], (row["data_sha256"], path))
            if first != row["data_sha256"]:
                raise ValueError(
                    f"{row['task']} has different data in {origin} (sha256 {first}) and {path} (sha256 "
                    f"{row['data_sha256']}): their results cannot be compared; leave one out or run it again"
                )
            kept, origin = merged.setdefault(key(row), (row, path))
            if kept != row:
                differing = ", ".join(
                    field
                    for field in Result.__annotations__
                    if kept[field] != row[field]
                )
                raise ValueError(
                    f"{name(row)} has two results, in {origin} and {path}, which differ in {differing}: remove one"
                )
    return [row for row, _ in merged.values()]


def _whole(row: Mapping[str, Any], where: str) -> Result:
    loss = row.get("loss")
    if isinstance(loss, float) and not math.isfinite(loss):
        row = {**row, "loss": None}
    checked = _checked(dict(row), where)
    try:
        json.dumps(checked, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}, {name(row)}: JSON cannot hold it: {error}"
        ) from error
    return checked


def _checked(row: dict[str, Any], where: str) -> Result:
    return structured(
        row,
        Result,
        where,
        fix="fix the row; what describes the run belongs into config",
    )
