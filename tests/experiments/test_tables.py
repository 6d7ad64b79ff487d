"""Each script writes the committed tables again from the committed rows, and measures nothing for it."""

import csv
import re
import shutil
from pathlib import Path
from typing import get_args

import basis
import basis_on_chips
import chips_of_language_models
import crossbar_pictures
import fusions_on_chips
import hardware
import larger_model
import numpy as np
import pool_value
import pool_value_language
import pytest
import results_page
import tiny
import trial_coverage
import warm_starts
import warm_starts_language
from lab.common import write_tables
from lab.scores import scores

from lorafusion_jax import shared_basis
from lorafusion_jax.trials import merge, read_lines

_RESULTS = Path(__file__).resolve().parents[2] / "results"


def _main(script, *options):
    """Return a function that runs a script in a folder with its rows."""
    return lambda folder: script.main([*options, "--out", str(folder)])


def _language(targets):
    def write(folder):
        rows = read_lines(folder / "language.jsonl")
        tuning = read_lines(folder / "language_tune.jsonl")
        tables = pool_value_language.tables(rows, tuning, targets)
        write_tables(folder, tables, "language_")

    return write


def _warm_starts_language(folder):
    tables = warm_starts_language.tables(read_lines(folder / "language.jsonl"))
    write_tables(folder, tables, "language_")


def _hardware(folder):
    write_tables(folder, hardware.tables(_numbers(folder / "rows.csv")))


def _basis_on_chips(folder):
    rows = _numbers(folder / "rows.csv")
    write_tables(folder, {"table": basis_on_chips.table(rows)})


def _basis(folder):
    """Write the table of five training rows."""
    names = ("LoRA", *basis.CHOICES, *basis.entries_of(get_args(basis.Group)))
    rows = merge(
        [_RESULTS / "small_pool_5" / "results.jsonl", folder / "results.jsonl"]
    )
    few = [row for row in rows if row["shots"] != "95+5" and row["method"] in names]
    (results,) = scores(few)
    directions = shared_basis(tiny.pool(3), 12)
    tables = basis.tables(results, directions, sizes=(12,))
    # As many directions as modules have ranks keep everything.
    assert tables["kept"][-1] == ["12", "0.75", "100 to 100"]
    write_tables(folder, {"table_5": tables["table"]})
    basis.draw(results, folder / "reads.png")


def _results_page(folder):
    where = f"{folder / 'results.jsonl'} --out {folder}"
    results_page.main(f"{where} --reference LoRAFusion".split())


def _numbers(path):
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


SCRIPTS = {
    "pool_value": ("pool_value", _main(pool_value)),
    "pool_value_language": ("pool_value", _language(pool_value_language.TARGETS)),
    "pool_value_language, Gemma": (
        "pool_value/gemma",
        _language(len(pool_value_language.FIXED)),
    ),
    "warm_starts": ("warm_starts", _main(warm_starts)),
    "warm_starts_language": ("warm_starts", _warm_starts_language),
    "larger_model": ("larger_model", _main(larger_model)),
    "chips_of_language_models": (
        "chips_of_language_models",
        _main(chips_of_language_models),
    ),
    "chips_of_language_models, larger": (
        "larger_model/on_chips",
        _main(
            chips_of_language_models,
            "--base",
            "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        ),
    ),
    "fusions_on_chips": ("fusions_on_chips", _main(fusions_on_chips)),
    "trial_coverage": ("trial", _main(trial_coverage)),
    "results_page": ("small_pool_5", _results_page),
    "results_page, controls": ("ablations/controls", _results_page),
    "hardware": ("hardware", _hardware),
    "basis": ("basis", _basis),
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


def _cells(name):
    """Return the lines of a committed table."""
    text = (_RESULTS / name).read_text()
    return [list(line) for line in csv.reader(text.splitlines())]


def _exact_match(task):
    lines = [line for line in _cells("fusions_on_chips/table.csv") if line[0] == task]
    return [lines[0][2], *(line[3] for line in lines)] if lines else []


_CONTRAST = "20 rows: loss minus that of LoRAFusion | nats | interval"
# A page, the start of a table's header, and the lines whose cells may follow a row's name.
PAGES = [
    ("results/language_on_chips", "chips and errors | chips | nats | interval",
     lambda: [[line[2], line[3], *line[5:7]]
              for line in _cells("chips_of_language_models/table.csv")]),
    ("results/fusions_on_chips", "task | digital | not prepared | prepared",
     lambda: [_exact_match(task) for task in (*fusions_on_chips.TASKS, "mean")]),
    ("results/pools", _CONTRAST,
     lambda: [line[start : start + 2]
              for name, start in (("pool_value/contrasts.csv", 4),
                                  ("pool_value/language_contrasts.csv", 4),
                                  ("warm_starts/language_contrasts.csv", 3))
              for line in _cells(name)]),
    ("guides/trial", "simulated trials", lambda: [line[1:] for line in _cells("trial/coverage_rounds.csv")]),
]  # fmt: skip


@pytest.mark.parametrize(("page", "header", "lines"), PAGES)
def test_a_page_shows_numbers_of_the_committed_tables(page, header, lines):
    text = (_RESULTS.parent / "docs" / f"{page}.md").read_text()
    _, _, below = text.partition(f"| {header}")
    rows = below.partition("\n\n")[0].splitlines()[2:]
    assert rows
    for row in rows:
        _, *cells = [cell.strip("* ") for cell in row.strip("|").split("|")]
        assert cells in lines(), row


def test_a_page_has_the_regret_of_the_real_trials():
    regrets = []
    for row in read_lines(_RESULTS / "trial" / "truth.jsonl"):
        losses = {arm: interval[0] for arm, interval in row["contrasts"].items()}
        losses |= {"LoRAFusion": 0.0, "rotated modules": np.inf}  # no control
        truth = row["true_loss"] | {"rotated modules": np.inf}
        choice = min(losses, key=losses.__getitem__)
        regrets.append(truth[choice] - min(truth.values()))
    text = (_RESULTS.parent / "docs" / "guides" / "trial.md").read_text()
    assert f"{len(regrets)} trials, the method of least" in text
    assert f"is {np.mean(regrets):.3f} nats worse" in text


def test_a_picture_of_a_crossbar_is_drawn_from_its_cells(capsys):
    figure = pytest.importorskip("matplotlib.figure", reason="needs the extra plots")
    picture = figure.Figure()
    crossbar_pictures.tile(picture)
    printed = capsys.readouterr().out
    error, largest_sum = map(float, re.findall(r"[\d.]+$|[\d.]+(?=,)", printed.strip()))
    assert 0 < error < 0.02 and largest_sum == 12
    assert len(picture.axes) > 8
