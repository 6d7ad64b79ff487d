"""What commands print about their input: one message on stderr, and exit code 2."""

import json
from pathlib import Path

import pytest

from lorafusion_jax import cli

_SMALL = Path(__file__).resolve().parents[2] / "examples" / "small"
# The shapes are those of tests/methods/test_methods.py, so that their programs are found.
_QUICK = [
    *("--modules", "2", "--epochs", "1", "--batch-size", "48"),
    *("--max-new-tokens", "8"),
]


@pytest.fixture
def labelled(tmp_path) -> Path:
    """A table of 40 labelled rows, as a user has it."""
    rows = (_SMALL / "tasks" / "double_digit" / "train.jsonl").read_text().splitlines()
    lines = ["input,target"]
    for row in map(json.loads, rows[:40]):
        lines.append(f'"{row["context"]}","{row["completion"]}"')
    path = tmp_path / "labelled.csv"
    path.write_text("\n".join(lines))
    return path


_WRONG_SOURCES = {
    "generate --run nowhere": ["--run nowhere does not exist"],
    "evaluate --runs a b": ["--runs a does not exist; --runs b does not exist"],
    "trial --base nowhere --pool p --task label.csv": [
        "--base nowhere does not exist",
        "--pool p does not exist",
        "--task label.csv does not exist",
    ],
    "generate --base owner/model.gguf --file t.txt": [
        "--base owner/model.gguf does not exist; --file t.txt does not exist"
    ],
    "fuse --base owner/name --task owner/rows.parquet --from f": [
        "error: --task owner/rows.parquet does not exist; --from f does not exist"
    ],
    "merge --base b.safetensors --pool p --weights a=1 --out o": [
        "--base b.safetensors does not exist; --pool p does not exist"
    ],
}


@pytest.mark.parametrize("call", _WRONG_SOURCES)
def test_all_sources_that_do_not_exist_are_named_at_once(call, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(call.split())
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    for words in _WRONG_SOURCES[call]:
        assert words in message


def _fuse(small: tuple[Path, Path], task: Path, *options: str) -> list[str]:
    base, pool = map(str, small)
    data = ["--base", base, "--pool", pool, "--task", str(task)]
    return ["fuse", *data, "--out", str(task.parent / "runs"), *_QUICK, *options]


def test_a_table_of_40_rows_trains_on_four_fifths_or_on_all(small, labelled, capsys):
    cli.main(_fuse(small, labelled))
    printed = capsys.readouterr()
    division = "labelled.csv has no test part: 32 of its 40 rows are used for training, 8 for testing"
    assert division in printed.err
    assert ", 8 test rows\n" in printed.out

    cli.main(_fuse(small, labelled, "--test-rows", "0", "--name", "all"))
    printed = capsys.readouterr()
    assert "40 of its 40 rows are used for training, 0 for testing" in printed.err
    folder = labelled.parent / "runs" / "all"
    results = json.loads((folder / "results.json").read_text())
    assert results["exact_match"] is None and results["test_rows"] == 0

    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--run", str(folder)])
    assert "was trained on all rows of its task" in capsys.readouterr().err
