"""Rows of a results file: JSON lines, one for each task, method, league and seed, that only ever grows.

A process that is killed while it appends leaves a last line without its end. Readers pass over it, and who appends
next removes it, so an interrupted matrix goes on with the rows that `done` does not name.
"""

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

LEAGUES = ("95+5", "5")
Key = tuple[str, str, str, int]


class Row(TypedDict):
    """The result of one method on one task with one seed; `correct` has a character for every test row, in order."""

    task: str
    method: str
    league: str
    seed: int
    exact_match: float  # percent, of `correct`
    option_accuracy: float | None  # percent, of `option_correct`
    loss: float | None  # null also where it was not finite, which JSON cannot say
    correct: str
    option_correct: str | None
    trainable: int
    steps: int
    forward_rows: int  # rows passed forward while adapting
    backward_rows: int
    seconds: float
    config: dict[str, Any]
    data_sha256: str  # of the task's rows
    versions: dict[str, str]
    device: str
    cores: int


def key(row: Mapping[str, Any]) -> Key:
    """Return what a row is the result of: task, method, league, seed."""
    return row["task"], row["method"], row["league"], row["seed"]


def done(rows: Iterable[Mapping[str, Any]]) -> set[Key]:
    """Return the task, method, league and seed of every row: what need not run again."""
    return {key(row) for row in rows}


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; a last line that was cut off is none.

    Raises:
      ValueError: a line is not a row; the message names file, line and fault.
      OSError: the file does not exist.
    """
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if number == len(lines):  # behind the last newline
            if _is_whole(line):
                rows.append(_checked(json.loads(line, parse_constant=_no_number), where))
            continue
        try:
            row = json.loads(line, parse_constant=_no_number)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{where} is not JSON ({error}): fix or remove the line") from error
        rows.append(_checked(row, where))
    return rows


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a file, which is made if it is not there, and return when they are on disk.

    Processes that append at the same time wait for each other. What the file held stays as it is, but for a last
    line that was cut off, which goes. A loss that is not finite is written as null.

    Raises:
      ValueError: a row lacks a key or has a wrong value; nothing is written.
    """
    lines = [_line(row, f"row {number} of {len(rows)} to append") for number, row in enumerate(rows, start=1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        last = _last_line(file.fileno())
        if last and _is_whole(last):
            lines.insert(0, b"\n")
        elif last:
            file.truncate(os.fstat(file.fileno()).st_size - len(last))
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())


def merge(files: Sequence[Path]) -> list[Row]:
    """Return the rows of several files; a row that occurs again, identical, counts once.

    Raises:
      ValueError: two rows of one task are of different data, or two of one task, method, league and seed differ.
    """
    merged: dict[Key, tuple[Row, Path]] = {}
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
                differing = ", ".join(name for name in Row.__annotations__ if kept[name] != row[name])
                raise ValueError(
                    f"{_name(row)} has two results, in {origin} and {path}, which differ in {differing}: remove one"
                )
    return [row for row, _ in merged.values()]


def _line(row: Mapping[str, Any], where: str) -> bytes:
    loss = row.get("loss")
    if isinstance(loss, float) and not math.isfinite(loss):
        row = {**row, "loss": None}
    checked = _checked(dict(row), where)
    try:
        return json.dumps(checked, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}, {_name(row)}: JSON cannot hold it: {error}") from error


def _last_line(descriptor: int) -> bytes:
    """Return what lies behind the last newline of a file: nothing, unless its last line has no end."""
    size, tail = os.fstat(descriptor).st_size, b""
    while b"\n" not in tail and len(tail) < size:
        length = min(65536, size - len(tail))
        tail = os.pread(descriptor, length, size - len(tail) - length) + tail
    return tail.rpartition(b"\n")[2]


def _is_whole(line: bytes) -> bool:
    """Return whether a line that no newline ends is all there: an object is cut off until its last brace."""
    try:
        return isinstance(json.loads(line), dict)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return False


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON: write null where there is no number")


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['task']}, {row['method']}, league {row['league']}, seed {row['seed']}"


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {type(row).__name__}: wanted an object with the keys of a row")
    if missing := [name for name in _WANTED if name not in row]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if unknown := [str(name) for name in row if name not in _WANTED]:
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}; put what describes the run into config")
    for name, (wanted, fits) in _WANTED.items():
        if not fits(row[name]):
            raise ValueError(f"{where}: {name} is {row[name]!r:.80}: wanted {wanted}")
    for percent, marks in (("exact_match", "correct"), ("option_accuracy", "option_correct")):
        if (row[percent] is None) != (row[marks] is None):
            raise ValueError(f"{where}: only one of {percent} and {marks} is null: wanted both or none")
        if row[marks] is not None:
            share = 100 * row[marks].count("1") / len(row[marks])
            if abs(share - row[percent]) > 0.051:  # percent may be rounded to a decimal
                raise ValueError(f"{where}: {percent} is {row[percent]}, but {marks} says {share:.2f}")
    if row["option_correct"] is not None and len(row["option_correct"]) != len(row["correct"]):
        lengths = f"{len(row['option_correct'])} test rows in option_correct, {len(row['correct'])} in correct"
        raise ValueError(f"{where}: {lengths}: wanted a character for each in both")
    return cast(Row, row)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _name_like(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _marks(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and not value.strip("01")


_NAME = ("a name", _name_like)
_COUNT = ("a count", _count)
_WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "task": _NAME,
    "method": _NAME,
    "league": (f"one of {', '.join(LEAGUES)}", lambda value: value in LEAGUES),
    "seed": _COUNT,
    "exact_match": ("a percentage", _number),
    "option_accuracy": ("a percentage or null", lambda value: value is None or _number(value)),
    "loss": ("a number or null", lambda value: value is None or _number(value)),
    "correct": ("a 0 or 1 for each of at least one test row", _marks),
    "option_correct": ("a 0 or 1 for each test row, or null", lambda value: value is None or _marks(value)),
    "trainable": _COUNT,
    "steps": _COUNT,
    "forward_rows": _COUNT,
    "backward_rows": _COUNT,
    "seconds": ("seconds", lambda value: _number(value) and value >= 0),
    "config": ("an object", lambda value: isinstance(value, dict)),
    "data_sha256": (
        "64 hexadecimal digits",
        lambda value: isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef"),
    ),
    "versions": ("an object", lambda value: isinstance(value, dict)),
    "device": _NAME,
    "cores": _COUNT,
}
