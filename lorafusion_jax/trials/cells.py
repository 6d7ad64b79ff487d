"""Cells of an experiment: each is measured once and is a row of a JSONL file, so an interrupted command continues.

A process that is killed while it appends leaves a last line without its end. Readers ignore that line, and the next
append removes it.
"""

import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..support.reading import check_regular, is_object
from ..support.writing import check_no_link, writing

Row = dict[str, Any]
Key = TypeVar("Key")


def read_lines(file: Path) -> list[Row]:
    """Return the objects of a file of JSON lines, none if it does not exist; a last line that was cut off is none.

    Raises:
      ValueError: a line is not JSON, or the path is a pipe or a device.
    """
    check_regular(file)
    *lines, last = file.read_bytes().split(b"\n") if file.exists() else [b""]
    rows = []
    for number, line in enumerate(
        [*lines, last] if is_object(last) else lines, start=1
    ):
        try:
            rows.append(
                json.loads(line)
            )  # which also reads NaN, the loss of a training that diverged
        except ValueError as error:
            raise ValueError(
                f"{file}, line {number} is not JSON ({error}): fix or remove the line"
            ) from error
    return rows


def append_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add objects to a file of JSON lines, which is made if it does not exist, and return when they are on disk.

    They replace a last line that was cut off. Processes that append at the same time wait for each other.

    Raises:
      ValueError: the file is a link.
      WriteError: the disk is full, read-only or gone, or has no locks.
    """
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        check_no_link(file)
        with open(file, "a+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            opened.seek(0)
            last = opened.read().rpartition(b"\n")[
                2
            ]  # empty if the last line has its end
            if is_object(last):
                lines = [b"\n", *lines]
            elif last:
                opened.truncate(os.fstat(opened.fileno()).st_size - len(last))
            opened.write(b"".join(lines))
            opened.flush()
            os.fsync(opened.fileno())


@dataclasses.dataclass(frozen=True)
class Cells(Generic[Key]):
    """The cells of an experiment that are measured, in a file.

    Attributes:
      file: JSON lines, one for each cell, that only ever grow.
      key_of: function that returns the key of a row's cell.
      common: settings that all rows of the file have.
      read: function that returns the rows of the file.
      append: function that adds rows to the file.
    """

    file: Path
    key_of: Callable[[Row], Key]
    common: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Path], list[Any]] = read_lines
    append: Callable[[Path, Sequence[Mapping[str, Any]]], None] = append_lines

    def rows(self) -> list[Row]:
        """Return the rows of the file, none if it does not exist.

        Raises:
          ValueError: a line is not JSON, or a row has other settings.
        """
        rows = self.read(self.file) if self.file.exists() else []
        for row in rows:
            others = {
                name: now for name, now in self.common.items() if row.get(name) != now
            }
            if other := [
                f"{name} was {row.get(name)}, is {now}" for name, now in others.items()
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
        """Measure the missing cells, and append their rows one by one.

        Args:
          keys: keys of the cells, in the order in which to measure them.
          measure: function that yields the rows of the missing cells, which it may group.
          show: function that returns a row as a line of the progress.
          after: function that is called after each row.
        """
        if not (missing := self.missing(keys)):
            return
        for number, row in enumerate(measure(missing), start=1):
            row = {**self.common, **row}
            self.append(self.file, [row])
            print(f"[{number}/{len(missing)}] {show(row)}", file=sys.stderr, flush=True)
            after()


def print_plan(costs: Iterable[tuple[str, float]], note: str = "") -> None:
    """Print the number of missing cells and their CPU time by label, and the time of all.

    Args:
      costs: label and CPU seconds of each cell.
      note: printed after the total.
    """
    by_label: dict[str, list[float]] = {}
    for label, seconds in costs:
        by_label.setdefault(label, []).append(seconds)
    for label, seconds in by_label.items():
        print(f"{label}: {len(seconds)} cells, {sum(seconds) / 60:.1f} minutes")
    count = sum(map(len, by_label.values()))
    total = sum(map(sum, by_label.values()))
    print(f"{count} cells, {total / 60:.0f} CPU minutes{note}")
