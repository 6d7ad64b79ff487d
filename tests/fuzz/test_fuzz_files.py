"""No damaged file does anything but load or be refused by name, whatever it holds (`make fuzz` draws more)."""

import random

import file_kinds
import pytest


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz") / "root"
    root.mkdir()
    kinds = file_kinds.kinds(root)
    for kind in kinds.values():
        kind.read(kind.file)
    return kinds, root


@pytest.mark.parametrize(
    ("seed", "inputs", "refused"),
    [(0, 10, 1), pytest.param(1, 80, 8, marks=pytest.mark.nightly)],
)
def test_damaged_files_are_read_or_refused(sandbox, seed, inputs, refused):
    kinds, root = sandbox
    for name, kind in kinds.items():
        draws = (random.Random(f"{name} {seed} {number}") for number in range(inputs))
        assert [file_kinds.outcome(kind, root, draw) for draw in draws].count(
            "refused"
        ) > refused, name
