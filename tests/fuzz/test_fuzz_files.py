"""No damaged file does anything but load or be refused by name, whatever it holds (`make fuzz` draws more)."""

import file_kinds
import pytest

_NAMES = (
    *("pool manifest", "pool manifest, not signed", "pool adapter weights", "pool adapter config", "basis manifest"),
    *(
        "basis arrays",
        "final manifest",
        "final arrays",
        "T5 config",
        "decoder config",
        "generation config",
        "base index",
        "base weights",
    ),
    *("adapter config", "adapter weights", "adapter pickle", "tokenizer", "chip arrays", "crossbar config"),
    *("run config", "run results", "run metrics", "run predictions", "chips manifest", "chips config"),
    *("cost constants", "result rows", "task list", "task rows", "bbh task", "bbh split", "tokenizer config"),
    *("GGUF, byte level", "GGUF, pieces", "data set state", "data set info", "data set rows"),
)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz") / "root"
    root.mkdir()
    kinds = file_kinds.kinds(root)
    assert set(kinds) == set(_NAMES)
    for kind in kinds.values():
        kind.read()
    return kinds, root


_SLOWEST = ("pool adapter weights", "pool adapter config", "cost constants")


@pytest.mark.parametrize("name", _NAMES)
def test_damaged_files_are_read_or_refused(sandbox, name):
    found = file_kinds.tally(*sandbox, name, seed=0, inputs=20)
    assert found["refused"] > 2


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name in _SLOWEST else ()) for name in _NAMES]
)
def test_many_damaged_files_are_read_or_refused(sandbox, name):
    assert file_kinds.tally(*sandbox, name, seed=1, inputs=80)["refused"] > 8
