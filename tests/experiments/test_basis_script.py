"""The experiment on a shared basis: its rows, their reads and differences, the plot."""

import dataclasses
import json
from typing import get_args

import basis
import numpy as np
import pytest
import tiny
from lab import matrix, methods
from lab.scores import scores
from made_up_rows import row

from lorafusion_jax import shared_basis

_ENTRIES = basis.entries_of(get_args(basis.Group))
_SHARE = {
    "LoRA": 0.3,
    "LoRAFusion": 0.5,
    "best 10": 0.6,
    "k = 16, best 10": 0.4,
    "k = 8, drawn": 0.2,
}


@pytest.fixture(scope="module")
def results():
    """Rows of two tasks: of ten answers each method gives so many right, the first ones."""
    entries = {name: methods.ARMS[name] for name in ("LoRA", "LoRAFusion")} | _ENTRIES
    rows = []
    for name, share in _SHARE.items():
        recipe = json.loads(
            json.dumps(dataclasses.asdict(matrix.recipe_of(entries[name])))
        )
        for task in ("one", "two"):
            of = row(task, name, 1, np.arange(10) < 10 * share, trainable=7)
            rows.append(of | {"config": {"recipe": recipe}})
    return scores(rows)[0]


def test_a_table_gives_reads_and_differences_to_the_same_modules(results, tmp_path):
    found = basis.tables(results, shared_basis(tiny.pool(3), 12), sizes=(8, 12))
    by_name = {of[0]: of[1:] for of in found["table"]}
    assert by_name["LoRA"][:2] == ["16", "0.05"]
    assert by_name["LoRAFusion"][:4] == ["320", "1.00", "7", "50.0"]
    assert by_name["best 10"][:2] == ["160", "0.50"]
    assert by_name["k = 16, best 10"][:2] == ["16", "0.05"]
    # Minus LoRAFusion, minus the best 10, minus the same whole modules.
    assert {
        name: [cell.split(" ")[0] for cell in of[-3:]]
        for name, of in by_name.items()
        if name in _SHARE
    } == {
        "LoRA": ["-20.0", "-30.0", ""],
        "LoRAFusion": ["", "-10.0", ""],
        "best 10": ["+10.0", "", ""],
        "k = 16, best 10": ["-10.0", "-20.0", "-20.0"],
        "k = 8, drawn": ["-30.0", "-40.0", "-30.0"],
    }
    assert found["kept"][-1] == [
        "12",
        "0.75",
        "100 to 100",
    ]  # as many directions as N r
    basis.draw(results, tmp_path / "reads.png")
    assert (tmp_path / "reads.png").read_bytes().startswith(b"\x89PNG")
