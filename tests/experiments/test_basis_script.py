"""The experiment on a shared basis: its rows, their reads and differences, the plot."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from made_up_rows import row

from lorafusion_jax import FuseOptions
from lorafusion_jax.adapters.basis import shared_basis
from lorafusion_jax.report import append_rows, scores
from lorafusion_jax.runs.prepare import check

_EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
_SHARE = {"LoRA": 0.3, "LoRAFusion": 0.5, "best 10": 0.6, "k = 16, best 10": 0.4, "k = 8, drawn": 0.2}


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(_EXPERIMENTS))
    try:
        import basis
        from lab import common

        yield common, basis
    finally:
        sys.path.remove(str(_EXPERIMENTS))


@pytest.fixture(scope="module")
def league(scripts):
    """Rows of two tasks: of ten answers each method gives so many right, the first ones."""
    common, basis = scripts
    entries = {"LoRA": basis.METHODS["LoRA"], "LoRAFusion": basis.METHODS["LoRAFusion"]}
    entries |= basis.entries_of(basis.get_args(basis.Group))
    rows = []
    for name, share in _SHARE.items():
        recipe = json.loads(json.dumps(dataclasses.asdict(common.recipe_of(entries[name]))))
        for task in ("one", "two"):
            of = row(task, name, 1, np.arange(10) < 10 * share, trainable=7)
            rows.append(of | {"config": {"recipe": recipe}})
    (found,) = scores(rows)
    return found


def test_every_row_can_run_and_none_is_there_twice(scripts):
    common, basis = scripts
    entries, settings = basis.entries_of(basis.get_args(basis.Group)), set()
    for entry in entries.values():
        recipe = common.recipe_of(entry)
        check(FuseOptions(base="b", pool="p", task="t", method=entry.method, control=entry.control, recipe=recipe))
        settings.add((entry.method, entry.control, recipe))
        assert (recipe.basis or 0) <= common.DIRECTIONS
    assert len(settings) == len(entries) == 2 + 5 * 3 + 1 + 8 + 1


def test_a_plan_has_a_table_for_each_basis(scripts, monkeypatch, capsys, tmp_path):
    _, basis = scripts
    task = str(_EXPERIMENTS.parent / "examples" / "small" / "tasks" / "double_digit")
    monkeypatch.setattr(basis, "small_pool_in_basis", lambda: tmp_path / "none")
    methods = ["all modules", "best 10", "k = 16, best 10", "k = 32, best 10"]
    basis.main(["--base", "t5-small", "--tasks", task, "--methods", *methods, "--plan"])
    head = [line for line in capsys.readouterr().out.splitlines() if line.startswith("League")]
    chosen = "League 95+5, 20 epochs, 10 modules by gradient"
    assert head == [
        "League 95+5, 20 epochs, 28 modules", chosen, f"{chosen}, in a basis of 16", f"{chosen}, in a basis of 32"
    ]  # fmt: skip


def test_a_table_gives_reads_and_differences_to_the_same_modules(scripts, league):
    _, basis = scripts
    found = basis.tables(league, shared_basis(tiny.pool(3), 12), sizes=(8, 12))
    by_name = {of[0]: of[1:] for of in found["table"]}
    assert by_name["LoRA"][:2] == ["16", "0.05"]
    assert by_name["LoRAFusion"][:4] == ["320", "1.00", "7", "50.0"]
    assert by_name["best 10"][:2] == ["160", "0.50"]
    assert by_name["k = 16, best 10"][:2] == ["16", "0.05"]
    # Minus LoRAFusion, minus the best 10, minus the same modules in whole.
    assert {name: [cell.split(" ")[0] for cell in of[-3:]] for name, of in by_name.items() if name in _SHARE} == {
        "LoRA": ["-20.0", "-30.0", ""],
        "LoRAFusion": ["", "-10.0", ""],
        "best 10": ["+10.0", "", ""],
        "k = 16, best 10": ["-10.0", "-20.0", "-20.0"],
        "k = 8, drawn": ["-30.0", "-40.0", "-30.0"],
    }
    assert found["kept"][-1] == ["12", "0.75", "100 to 100"]  # as many directions as N r


def test_a_plot_is_drawn_of_the_rows_that_are_there(scripts, league, tmp_path):
    _, basis = scripts
    basis.draw(league, tmp_path / "reads.png")
    assert (tmp_path / "reads.png").read_bytes().startswith(b"\x89PNG")


def test_whole_modules_are_shown_on_the_tasks_and_seeds_that_were_run(scripts, monkeypatch, tmp_path):
    _, basis = scripts
    right = np.arange(10) < 5
    main, own = tmp_path / "main.jsonl", tmp_path / "own.jsonl"
    append_rows(main, [row(task, "LoRAFusion", seed, right) for task in ("one", "two") for seed in (1, 2)])
    append_rows(own, [row("one", "all modules", 2, right)])
    shown = []
    monkeypatch.setattr(basis, "small_pool_in_basis", lambda: tmp_path / "none")
    monkeypatch.setattr(basis, "run_matrix", lambda options, entries: own)
    monkeypatch.setattr(basis, "load_basis", lambda folder: None)
    monkeypatch.setattr(basis, "tables", lambda league, of: shown.append(league) or {})
    monkeypatch.setattr(basis, "draw", lambda league, path: None)
    given = ["--out", str(tmp_path), "--main", str(main)]
    basis.main(given)
    (league,) = shown
    assert [(of["task"], of["method"], of["seed"]) for of in league.rows] == [
        ("one", "LoRAFusion", 2), ("one", "all modules", 2)
    ]  # fmt: skip
    append_rows(own, [row("three", "all modules", 2, right) | {"league": "5"}])
    with pytest.raises(ValueError, match="no LoRAFusion of league 5 .*--main"):
        basis.main(given)
