"""Readers of the rows of a task: JSONL, JSON lists, BIG-Bench Hard JSON, folders of files, `datasets`."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..support.reading import FileError, check_lfs, decode, expand_user, utf8
from ..support.text import DATASET_ID, is_file_name, some

Row = Any  # any JSON: checked where rows become examples
Rows = Iterator[tuple[str, Row]]  # each with its place, for messages

# The plain names and LoraHub's.
_PARTS = {
    "train.jsonl": "train",
    "example.jsonl": "train",
    "test.jsonl": "test",
    "zero_shot.jsonl": "test",
}
# In CSV, where a number has no quotes to tell it from a text.
_NOT_FINITE = re.compile(r"\s*[+-]?(nan|inf|infinity)\s*", re.IGNORECASE)


def read_rows(source: str | Path) -> dict[str, Rows]:
    """Return the rows of each part, "train" and "test", or of "all" where the source does not divide them.

    Raises a ValueError for an unknown source or layout and, also while rows are read, for damaged and empty files.
    """
    path = expand_user(source)
    try:
        is_file = path.is_file()
    except OSError as error:  # a name that is too long
        raise ValueError(
            f"{str(source)!r} cannot be a task: {error.strerror}; shorten its name"
        ) from None
    if is_file:
        return {_PARTS.get(path.name, "all"): _file_rows(path)}
    if path.is_dir() and not any(
        (path / file).is_file() for file in ("dataset_dict.json", "state.json")
    ):
        return _folder_rows(path)
    return _dataset_rows(str(path) if path.is_dir() else str(source))


def task_name(source: str | Path) -> str:
    """Return the name of a task: the last part of its source, without a file's suffix or a hub id's revision."""
    hub_id = None if expand_user(source).exists() else DATASET_ID.fullmatch(str(source))
    if hub_id is not None:
        source = hub_id[1] + (f":{hub_id[3]}" if hub_id[3] else "")
    path = Path(os.path.abspath(source))
    name = path.stem if is_file_name(path.name) and not path.is_dir() else path.name
    # Colons are before a hub id's config, and are no part of a folder's name. The name never leads to another folder.
    return name.replace(":", "-").lstrip(".") or "task"


def _folder_rows(path: Path) -> dict[str, Rows]:
    files = [file for file in _PARTS if (path / file).is_file()]
    if not files:
        entries = some(sorted(entry.name for entry in path.iterdir())) or "nothing"
        raise ValueError(
            f"{path} is not a task folder: it holds {entries}; expected train.jsonl and test.jsonl, example.jsonl and "
            "zero_shot.jsonl, or a folder of datasets' save_to_disk. Give a single file by its own path"
        )
    parts = {_PARTS[file]: _file_rows(path / file) for file in files}
    if len(parts) < len(files):
        raise ValueError(
            f"{path} holds {', '.join(files)}, two files for one part: keep one of them"
        )
    return parts


def _file_rows(path: Path) -> Rows:
    readers = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    if path.suffix not in readers:
        raise ValueError(
            f"{path} ends in {path.suffix or 'no suffix'}: expected one of {', '.join(readers)}"
        )
    check_lfs(path)
    return _some(readers[path.suffix](path), path)


def _jsonl_rows(path: Path) -> Rows:
    # As bytes: a text of JSON may hold U+2028 and its like, which end no line here.
    with path.open("rb") as file:
        for n, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {n}"
                yield where, decode(line, Any, where, fix="fix the line")


def _json_rows(path: Path) -> Rows:
    content: Any = decode(path.read_bytes() or b"[]", Any, path, fix="fix it")
    if isinstance(content, list):
        yield from ((f"{path}, row {n}", row) for n, row in enumerate(content, start=1))
        return
    rows = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(
            f'{path} is neither a list, [{{"input": ..., "output": ...}}], nor laid out as BIG-Bench Hard, '
            '{"examples": [{"input": ..., "target": ...}]}: fix it, or write one row a line into a .jsonl file'
        )
    yield from ((f"{path}, example {n}", row) for n, row in enumerate(rows, start=1))


def _csv_rows(path: Path) -> Rows:
    with utf8(path), path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            _check_columns(rows.fieldnames or (), path)
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    header = some(rows.fieldnames or [])
                    raise ValueError(
                        f"{where} has more or fewer columns than the header {header}: fix the line"
                    )
                yield (
                    where,
                    {
                        name: float(cell) if _NOT_FINITE.fullmatch(cell) else cell
                        for name, cell in row.items()
                    },
                )
        except csv.Error as error:
            fix = "quote texts that contain commas, quotes or line breaks"
            raise FileError(
                f"{path}, line {rows.line_num + 1}", got=f"not CSV: {error}", fix=fix
            ) from error


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, path)
            for n, row in enumerate(
                row for batch in file.iter_batches(1000) for row in batch.to_pylist()
            ):
                yield f"{path}, row {n}", row
    except FileError:
        raise
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
        LookupError,
    ) as error:  # also of single values
        raise FileError(
            path, got=f"not Parquet: {error}", fix="write the file again"
        ) from error


def _check_columns(names: Sequence[str], path: Path) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FileError(
            path, got=f"two columns named {some(twice)}", fix="rename one of them"
        )


def _dataset_rows(source: str) -> dict[str, Rows]:
    local = Path(source).is_dir()
    hub_id = DATASET_ID.fullmatch(source)
    if not local and (hub_id is None or is_file_name(source)):
        raise ValueError(
            f"{source} does not exist: give a task file, a task folder or a data set's hub id"
        )
    import datasets

    try:
        if local:
            for path in Path(source).rglob("*"):
                if path.suffix == ".json":
                    decode(path.read_bytes(), Any, path, fix="save the data again")
            saved = datasets.load_from_disk(source)
            loaded: Any = (
                {"all": saved} if isinstance(saved, datasets.Dataset) else saved
            )
            for part in loaded.values():
                part.data.validate(
                    full=True
                )  # Arrow follows offsets of its files without a look, out of the file
        else:
            assert hub_id is not None
            repository, revision, config = hub_id.groups()
            loaded = datasets.load_dataset(repository, config, revision=revision)
        # As they are stored: decoding would open the images and sounds that a row names, also over the network.
        loaded = {split: part.with_format("arrow") for split, part in loaded.items()}
    except (
        Exception
    ) as error:  # of many kinds; a saved data set without rows gives an IndexError
        cause = f"{type(error).__name__}: {error}"
        if local:
            raise ValueError(
                f"{source} cannot be loaded by datasets ({cause}): save it again"
            ) from error
        raise ValueError(
            f"{source} is not a local path, and could not be loaded from the hub: {cause} (check the spelling, the "
            "network and HF_HUB_OFFLINE; private data, and data with terms to accept, need `hf auth login` or HF_TOKEN)"
        ) from error

    def rows(split: str) -> Rows:
        where = f"{source}, split {split}"
        stored = (
            row for batch in loaded[split].iter(1000) for row in batch.to_pylist()
        )
        return _some(
            ((f"{where}, row {n}", row) for n, row in enumerate(stored)), where
        )

    if len(loaded) == 1:
        return {"all": rows(*loaded)}
    splits = {"train": "train", "test": "test" if "test" in loaded else "validation"}
    parts = {part: rows(split) for part, split in splits.items() if split in loaded}
    if not parts:
        raise ValueError(
            f"{source} has the splits {some([*loaded])}: expected train, and test or validation"
        )
    return parts


def _some(rows: Rows, where: str | Path) -> Rows:
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{where} is empty: a task needs at least one row")
    yield first
    yield from rows
