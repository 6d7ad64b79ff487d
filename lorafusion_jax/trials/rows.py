"""Rows of results: JSON lines of a file that only ever grows, so an interrupted command continues.

A process that is killed while it appends leaves a last line without its end. Readers ignore that line, and the next
append removes it. Rows of jobs have a schema, and one for each task, method, number of shots and seed.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypedDict, TypeVar

import msgspec

from ..support.reading import FileError, read_lines
from ..support.writing import append_lines

Row = dict[str, Any]
# Rows to learn from: 95 and 5 for validation, or LoraHub's 5.
Shots = Literal["95+5", "5"]
ResultKey = tuple[str, str, str, int]
Key = TypeVar("Key")

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


def key(row: Mapping[str, Any]) -> tuple[str, str, str, int]:
    """Return task, method, shots and seed of a row, which identify it."""
    return row["task"], row["method"], row["shots"], row["seed"]


def name(row: Mapping[str, Any]) -> str:
    """Return the same in words."""
    return f"{row['task']}, {row['method']}, {row['shots']} shots, seed {row['seed']}"


@dataclasses.dataclass(frozen=True)
class ResultRows(Generic[Key]):
    """Measured results of an experiment, in a file.

    Attributes:
      file: JSON lines, one for each result, which only ever grow.
      key_of: function that returns the key of a row.
      common: settings that all rows of the file have.
      kind: type of the rows, as for `read_lines`.
    """

    file: Path
    key_of: Callable[[Row], Key]
    common: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kind: Any = Row

    def rows(self) -> list[Row]:
        """Return the rows of the file, none if it does not exist.

        Raises:
          ValueError: a line is not JSON, or a row has other settings.
        """
        rows: list[Row] = read_lines(self.file, self.kind)
        for row in rows:
            if other := [
                f"{name} was {row.get(name)}, is {value}"
                for name, value in self.common.items()
                if row.get(name) != value
            ]:
                raise ValueError(
                    f"{self.file} holds other rows ({'; '.join(other)}): give another --out"
                )
        return rows

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Return the keys without a row, each once, in their order."""
        have = {self.key_of(row) for row in self.rows()}
        return [key for key in dict.fromkeys(keys) if key not in have]

    def fill(
        self,
        keys: Iterable[Key],
        measure: Callable[[list[Key]], Iterable[Mapping[str, Any]]],
        show: Callable[[Row], str],
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Measure the missing results, and append their rows one by one.

        Args:
          keys: keys of the results, in the order in which to measure them.
          measure: function that yields the rows of the missing results, which it may group.
          show: function that returns a row as a line of the progress.
          after: function that is called after each row.
        """
        if not (missing := self.missing(keys)):
            return
        for number, row in enumerate(measure(missing), start=1):
            row = {**self.common, **row}
            append_lines(self.file, [row])
            print(f"[{number}/{len(missing)}] {show(row)}", file=sys.stderr, flush=True)
            after()


def read_rows(path: Path) -> list[Result]:
    """Return the rows of a file, without a last line that was cut off; ValueError for a line that is not a row."""
    if not path.exists():
        raise FileError(path, got="missing", fix="restore it from a copy")
    return read_lines(path, Result)


def merge(files: Sequence[Path]) -> list[Result]:
    """Return the rows of several files; a row that occurs again, identical, counts once.

    Rows of one task with different data, or two different results of one key, are a ValueError.
    """
    merged: dict[ResultKey, tuple[Result, Path]] = {}
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
