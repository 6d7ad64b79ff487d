"""What commands print about their input: one message on stderr, and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from json_files import read_json
from refusals import told

from lorafusion_jax import cli

_SMALL = Path(__file__).resolve().parents[2] / "examples" / "small"
# The shapes are those of tests/methods/test_methods.py, so that their programs are found.
_QUICK = [
    *("--modules", "2", "--epochs", "1", "--batch-size", "48"),
    *("--max-new-tokens", "8"),
]


@pytest.fixture
def labelled(tmp_path):
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
    message = told(capsys, call.split())
    assert message.count("\n") == 1
    for words in _WRONG_SOURCES[call]:
        assert words in message


# The name of the command does not matter. XLA reads its log level from a variable.
_FAULTY = """
import os
import sys
import types
from lorafusion_jax import cli
def main(arguments):
    import jax
    print(os.environ.get("TF_CPP_MIN_LOG_LEVEL"))
    raise jax.errors.JaxRuntimeError(sys.argv[1])
sys.modules["lorafusion_jax.cli.cost"] = types.SimpleNamespace(params_command=main)
cli.main(["params", *sys.argv[2:]])
"""


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.",
            "error: the device has too little memory: use --dtype bfloat16,",
        ),
        (
            "INTERNAL: ptxas fell over\n%fusion.1 = f32[]",
            "error: JaxRuntimeError: INTERNAL: ptxas fell over (a fault of this program",
        ),
    ],
)
def test_messages_of_xla_and_tracebacks_are_shown_only_with_verbose(
    error, line, verbose
):
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    done = subprocess.run(
        [sys.executable, "-c", _FAULTY, error, *(["--verbose"] if verbose else [])],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and line in done.stderr
    assert ("Traceback" in done.stderr) == verbose
    assert (done.stdout == "3\n") != verbose
    assert verbose or done.stderr.count("\n") == 1


def test_a_wrong_seed_is_told_by_its_option(small, labelled, capsys):
    for command, option in (("fuse", "seeds"), ("trial", "seed")):
        arguments = _fuse(small, labelled)[1:7]
        message = told(capsys, [command, *arguments, f"--{option}", "-1"])
        assert f"error: {option} is -1: expected an integer" in message


def test_a_run_is_replaced_only_with_overwrite_and_once_the_new_one_is_complete(
    small, labelled, capsys
):
    arguments = _fuse(small, labelled, "--test-rows", "2", "--name", "cell")
    cli.main(arguments)
    folder = labelled.parent / "runs" / "cell"
    first = (folder / "results.json").read_text()
    assert "or replace it with --overwrite" in told(capsys, arguments)

    changed = [*arguments, "--overwrite", "--seeds", "4"]
    told(capsys, [*changed, "--batch-size", "0"])
    assert (folder / "results.json").read_text() == first
    cli.main(changed)
    results = read_json(folder / "results.json")
    assert [seed["seed"] for seed in results["seeds"]] == [4]
    options = read_json(folder / "config.json")["options"]
    assert options["name"] == "cell"
    assert [path.name for path in folder.parent.iterdir()] == ["cell"]

    (folder / "config.json").write_text('{"model_type": "llama"}')  # another program's
    assert "config.json: " in told(capsys, changed)
    assert folder.is_dir()


def _fuse(small, task, *options):
    base, pool = map(str, small)
    data = f"--base {base} --pool {pool} --task {task}".split()
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
    results = read_json(folder / "results.json")
    assert results["exact_match"] is None and results["test_rows"] == 0

    message = told(capsys, ["evaluate", "--run", str(folder)])
    assert "was trained on all rows of its task" in message
