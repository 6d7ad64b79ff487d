"""Each script writes the committed tables again from the committed rows, and measures nothing for it."""

import csv
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import basis_on_chips
import crossbar_pictures
import hardware
import pool_value
import pool_value_language
import prepare
import prepare_small
import pytest
import restore
import warm_starts
import warm_starts_language
from lab.common import write_tables

from lorafusion_jax.trials import read_lines

_RESULTS = Path(__file__).resolve().parents[2] / "results"
_GEMMA = ("--base", "gemma-3-270m-q4_k_m.gguf")
Script = Callable[[Path], None]


def _main(script: Any, *options: str) -> Script:
    """Return a function that runs a script in a folder with its rows."""
    return lambda folder: script.main([*options, "--out", str(folder)])


def _language(targets: int) -> Script:
    def write(folder: Path) -> None:
        rows = read_lines(folder / "language.jsonl")
        tuning = read_lines(folder / "language_tune.jsonl")
        tables = pool_value_language.tables(rows, tuning, targets)
        write_tables(folder, tables, "language_")

    return write


def _warm_starts_language(folder: Path) -> None:
    tables = warm_starts_language.tables(read_lines(folder / "language.jsonl"))
    write_tables(folder, tables, "language_")


def _hardware(folder: Path) -> None:
    write_tables(folder, hardware.tables(_numbers(folder / "rows.csv")))
    for sweep in hardware.POINTS:
        table = hardware.table(_numbers(folder / f"{sweep}.csv"))
        write_tables(folder, {f"{sweep}_table": table})


def _basis_on_chips(folder: Path) -> None:
    rows = _numbers(folder / "rows.csv")
    write_tables(folder, {"table": basis_on_chips.table(rows)})


def _numbers(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file with numbers, and None where a cell is empty."""
    values = {"": None, "True": True, "False": False}
    with path.open() as file:
        rows = [
            {name: values.get(cell, cell) for name, cell in row.items()}
            for row in csv.DictReader(file)
        ]
    for row in rows:
        row["chip"] = int(row["chip"])
        row["exact_match"] = float(row["exact_match"])
    return rows


SCRIPTS: dict[str, tuple[str, Script]] = {
    "pool_value": ("pool_value", _main(pool_value)),
    "pool_value_language": ("pool_value", _language(pool_value_language.TARGETS)),
    "pool_value_language, Gemma": (
        "pool_value/gemma",
        _language(len(pool_value_language.FIXED)),
    ),
    "warm_starts": ("warm_starts", _main(warm_starts)),
    "warm_starts_language": ("warm_starts", _warm_starts_language),
    "prepare": ("prepare", _main(prepare)),
    "prepare, more": ("prepare/more", _main(prepare)),
    "prepare, Gemma": ("prepare/gemma", _main(prepare, *_GEMMA)),
    "prepare_small": ("prepare", _main(prepare_small, "--parts")),
    "restore": ("restore", _main(restore)),
    "restore, Gemma": ("restore/gemma", _main(restore, *_GEMMA)),
    "hardware": ("hardware", _hardware),
    "basis_on_chips": ("basis_on_chips", _basis_on_chips),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_writes_the_committed_tables(script, tmp_path):
    name, write = SCRIPTS[script]
    committed = _RESULTS / name
    folder = tmp_path / "out"
    shutil.copytree(committed, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write(folder)
    written = [
        path
        for path in folder.glob("*.csv")
        if path.stat().st_mtime_ns != before.get(path)
    ]
    assert written
    for path in written:
        assert path.read_text() == (committed / path.name).read_text(), path.name
    for path in folder.glob("*.jsonl"):
        assert path.stat().st_mtime_ns == before[path], "a row was measured"


def test_a_picture_of_a_crossbar_is_drawn_from_its_cells(capsys):
    figure = pytest.importorskip("matplotlib.figure", reason="needs the extra plots")
    picture = figure.Figure()
    crossbar_pictures.tile(picture)
    printed = capsys.readouterr().out
    error, largest_sum = map(float, re.findall(r"[\d.]+$|[\d.]+(?=,)", printed.strip()))
    assert 0 < error < 0.02 and largest_sum == 12
    assert len(picture.axes) > 8
