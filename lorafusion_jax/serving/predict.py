"""Answers of several fused runs at once: `lorafusion generate --runs`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.generate import GREEDY, Sampling
from ..support.checks import at_least
from ..support.reading import check_regular, utf8
from ..support.reading import decode as decode_json
from ..support.text import shown
from .service import FusedRun, Service, run_input

_EXAMPLE = '{"run": "a-run", "input": "some text"}'


def generate_rows(
    runs: Sequence[Path],
    *,
    file: Path | None = None,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    eval_batch: int = 64,
    sampling: Sampling = GREEDY,
    sampling_seed: int = 0,
) -> list[str]:
    """Return the answers of runs on one base and pool to the rows of a JSONL file, or of standard input.

    A row is {"run": NAME, "input": TEXT}, or has the columns of the run's prompt. NAME is a folder of the runs or its
    last part. The base model answers rows without a run. Other arguments are options of `lorafusion generate`. Raises a
    ValueError for a row of another form or run, and for runs that cannot be served together.
    """
    at_least(1, max_new_tokens=max_new_tokens, eval_batch=eval_batch)
    by_name = _read(runs)
    names = {spelling: name for name in by_name for spelling in (name, str(by_name[name].folder))}
    where = file or "standard input"
    if file is not None and not file.is_fifo():
        check_regular(file)
    with utf8(where):
        text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8-sig")
        # A text of JSON may hold U+2028 and its like, which end no line here.
        lines = enumerate(text.split("\n"), start=1)
        rows = [_row(line.encode(), f"{where}:{i}", names, by_name) for i, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{where} holds no rows: give a line for each answer, such as {_EXAMPLE}")
    service = Service(list(by_name.values()), capacity=len(by_name))
    for name, run in by_name.items():
        service.add(name, run, seed)
    texts, asked = zip(*rows, strict=True)
    how = {"sampling": sampling, "sampling_seed": sampling_seed}
    return service.generate(texts, asked, max_new_tokens=max_new_tokens, eval_batch=eval_batch, **how)


def _row(
    line: bytes, where: str, names: Mapping[str, str], runs: Mapping[str, FusedRun]
) -> tuple[dict[str, Any], str | None]:
    """Return the columns of a row and the name of the run that answers it."""
    row = decode_json(line, dict[str, Any], where, own=False, fix=f"give a row such as {_EXAMPLE}")
    run = row.pop("run", None)
    if run is not None and run not in [*names]:  # JSON of any type
        known = ", ".join(dict.fromkeys(names.values()))
        raise ValueError(f"{where} names the run {shown(run)}: expected one of {known}")
    name = None if run is None else names[run]
    run_input(row, where, None if name is None else runs[name])  # raises ValueError before anything is loaded
    return row, name


def _read(folders: Sequence[Path]) -> dict[str, FusedRun]:
    """Return the runs by name: the last part of the folder, or all of it where two runs have the same last part."""
    last = [folder.absolute().name for folder in folders]
    names = [str(folder) if last.count(name) > 1 else name for folder, name in zip(folders, last, strict=True)]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"a run is given twice in {', '.join(map(str, folders))}: name each one once")
    return {name: FusedRun.read(folder) for name, folder in zip(names, folders, strict=True)}
