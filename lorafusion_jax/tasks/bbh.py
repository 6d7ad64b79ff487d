"""LoraHub's split of BIG-Bench Hard, rebuilt byte for byte from the benchmark's own files and an index of rows.

The index is JSON, `{task: {"example": rows, "zero_shot": rows, "prefix": [text], "sep": text, "sha256_example": text,
"sha256_zero_shot": text}}`: the rows of `task.json`, counted from 0, for training and test, in their order; the prompt,
prefix + "Q: " + input + sep + "A:"; and the digest of each file. `sep` is a line break for all tasks except ruin_names.
LoraHub's index is `lorahub_split.json`, next to this file.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

from ..support.writing import write
from .data import as_example
from .readers import Row, read_rows

LORAHUB_DATA = "https://github.com/sail-sg/lorahub/releases/download/0.1/data_bbh.zip"
BBH_DATA = "the folder bbh of https://github.com/suzgunmirac/BIG-Bench-Hard"

_INDEX = Path(__file__).with_name("lorahub_split.json")
_PARTS: tuple[Literal["example", "zero_shot"], ...] = (
    "example",
    "zero_shot",
)  # LoraHub's: train and test


class _Entry(TypedDict):
    prefix: list[str]
    sep: str
    example: list[int]
    zero_shot: list[int]
    sha256_example: str
    sha256_zero_shot: str


def write_lorahub_split(
    bbh: Path, out: Path, names: Sequence[str] | None = None, *, index: Path = _INDEX
) -> list[Path]:
    """Write each task's `example.jsonl`, 100 training rows, and `zero_shot.jsonl`, its test rows, as in LoraHub.

    Every file is checked against its digest before the first is written. An existing file with the same content is
    left alone.

    Args:
      bbh: folder with the benchmark's JSON files (`bbh` of github.com/suzgunmirac/BIG-Bench-Hard).
      out: folder of the tasks' folders, which are returned; `load_task` reads them.
      names: names of the tasks; by default all of the index.
      index: file that lists the rows of each part; by default LoraHub's, which comes with the package.

    Raises:
      ValueError: on an unknown task, a file of the benchmark that is missing or lacks a row, rows that differ from
        LoraHub's, and an existing file of another content.
    """
    entries: dict[str, _Entry] = json.loads(index.read_text(encoding="utf-8"))
    for name in names or ():
        if name not in entries:
            raise ValueError(
                f"{index} has no task {name}: it has {', '.join(entries)}; choose of these"
            )
    chosen = entries if names is None else {name: entries[name] for name in names}
    contents: dict[Path, bytes] = {}
    for name, entry in chosen.items():
        source = bbh / f"{name}.json"
        if not source.is_file():
            raise ValueError(
                f"{source} does not exist: give {BBH_DATA}, which has a JSON file for each task, or use "
                f"LoraHub's own files, data_bbh of its release 0.1 ({LORAHUB_DATA})"
            )
        rows = list(read_rows(source)["all"])
        for part in _PARTS:
            contents[out / name / f"{part}.jsonl"] = _file(entry, part, rows, source)
    missing = [path for path in contents if not path.exists()]
    for path, content in contents.items():
        if path not in missing and path.read_bytes() != content:
            raise ValueError(
                f"{path} exists with other rows: move it away, or write to another folder"
            )
    for path in missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = contents[path]
        write(path, lambda file, content=content: file.write(content))
    return [out / name for name in chosen]


def _file(
    entry: _Entry,
    part: Literal["example", "zero_shot"],
    rows: list[tuple[str, Row]],
    source: Path,
) -> bytes:
    lines = []
    for number in entry[part]:
        if number >= len(rows):
            raise ValueError(
                f"{source.stem}, {part}: the index lists row {number!r} of {source}, which has rows 0 to "
                f"{len(rows) - 1}: the benchmark's file is cut short, or the index is that of another one"
            )
        where, row = rows[number]
        example = as_example(row, where)
        prompt = f"{entry['prefix'][0]}Q: {example.input}{entry['sep']}A:"
        lines.append(
            json.dumps(
                {"context": prompt, "completion": example.target}, ensure_ascii=False
            )
        )
    content = "\n".join(lines).encode()
    digest = hashlib.sha256(content).hexdigest()
    expected = (
        entry["sha256_example"] if part == "example" else entry["sha256_zero_shot"]
    )
    if digest != expected:
        raise ValueError(
            f"{source.stem}, {part}.jsonl: its rows have the sha256 {digest[:12]}..., and LoraHub's have "
            f"{expected[:12]}...: {source} is probably another version of the benchmark's file; "
            f"take that of {BBH_DATA}, unchanged"
        )
    return content
