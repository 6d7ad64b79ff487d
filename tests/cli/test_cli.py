"""The commands as they are typed, on the embedded pool and on its first adapters cut to one block."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from json_files import read_json
from refusals import told

from lorafusion_jax import cli

_ROOT = Path(__file__).resolve().parents[2]
_SMALL = _ROOT / "examples" / "small"
_FUSE = ["fuse", "--task", str(_SMALL / "tasks" / "double_digit")]
# The programs are those of tests/methods/test_methods.py.
_QUICK = (
    "--modules 2 --epochs 1 --batch-size 48 --max-new-tokens 8 --test-rows 5".split()
)


def _convert(base, adapters, out):
    folders = " ".join(map(str, sorted(adapters.iterdir())))
    cli.main(f"convert --base {base} --adapters {folders} --out {out}".split())
    return out


@pytest.fixture(scope="module")
def pool(small, tmp_path_factory):
    return _convert(*small, tmp_path_factory.mktemp("pool") / "pool")


def _fuse(base, pool, out):
    where = f"--base {base} --pool {pool} --seeds 1 2 --out {out} --name r"
    cli.main([*_FUSE, *_QUICK, *where.split()])
    return out / "r"


@pytest.fixture(scope="module")
def run(small, pool, tmp_path_factory):
    return _fuse(small[0], pool, tmp_path_factory.mktemp("runs"))


@pytest.mark.smoke
def test_convert_writes_all_adapters_of_the_embedded_pool(tmp_path):
    _convert(_SMALL / "base", _SMALL / "adapters", tmp_path / "pool")
    manifest = read_json(tmp_path / "pool" / "manifest.json")
    assert len(manifest["metadata"]["adapters"]) == 28


def test_evaluate_scores_all_rows_of_a_file_that_the_run_has_not_seen(
    run, tmp_path, capsys
):
    rows = (
        (_SMALL / "tasks" / "double_digit" / "test.jsonl").read_text().splitlines()[:3]
    )
    (tmp_path / "new.jsonl").write_text("\n".join(rows))
    (only_test := tmp_path / "only_test").mkdir()
    (only_test / "test.jsonl").write_text("\n".join(rows))
    printed = []
    for task in (tmp_path / "new.jsonl", only_test):
        cli.main(f"evaluate --run {run} --task {task}".split())
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert [line.split()[0] for line in printed[0].splitlines()] == [
        "seed",
        "1",
        "2",
        "mean",
    ]


def test_errors_are_one_message_and_exit_code_2(run, tmp_path, capsys):
    chips = f"evaluate --run {run} --crossbar isaac"
    out = tmp_path / "x"
    for command, message in [
        (
            f"{' '.join(_FUSE)} --base {_SMALL / 'base'} --adapters 0 --modules 3",
            "--adapters names the modules: leave it out, or --modules",
        ),
        (
            f"export --out {out}",
            "nothing to export: give one of --run RUN, --pool POOL --adapter NAME, and",
        ),
        (
            f"export --base owner/a --run {run} --out {out}",
            "nothing to export: give one of",
        ),
        (
            f"export --pool {tmp_path} --adapter a --format gguf --out {out}",
            "--format: only for a run, because an adapter of a pool is saved as it came",
        ),
        (f"evaluate --run {tmp_path}", ": not a run: it has no config.json"),
        (
            f"{chips} --ages 1h 1day --report",
            "a report is of one age: give one of --ages",
        ),
        (
            f"{chips} --keep-digital embedding --report",
            "the rule 'embedding' matches no weight",
        ),
        (
            "generate --base owner/b --top-p 0.9",
            "top_k and top_p filter a draw, and temperature 0 draws",
        ),
    ]:
        error = told(capsys, command.split())
        assert error.startswith("error: ") and message in error


_PRINTS = "import sys; from lorafusion_jax import cli; cli.run(lambda _: print('x' * int(sys.argv[1])), [])"


@pytest.mark.parametrize(
    "arguments", [["-m", "lorafusion_jax.cli", "--help"], ["-c", _PRINTS, "1000000"]]
)
def test_a_command_ends_without_a_message_where_the_reader_of_its_output_has_ended(
    arguments,
):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as output:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, "")
