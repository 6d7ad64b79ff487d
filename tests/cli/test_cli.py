"""The commands as they are typed, on the embedded pool and on its first adapters cut to one block."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from lorafusion_jax import cli
from lorafusion_jax.io.source import sha256

_ROOT = Path(__file__).resolve().parents[2]
_SMALL = _ROOT / "examples" / "small"
_FUSE = ["fuse", "--task", str(_SMALL / "tasks" / "double_digit")]
# The programs are those of tests/methods/test_methods.py.
_QUICK = [
    "--modules",
    "2",
    "--epochs",
    "1",
    "--batch-size",
    "48",
    "--max-new-tokens",
    "8",
    "--test-rows",
    "5",
]


def _convert(base: Path, adapters: Path, out: Path) -> Path:
    folders = [str(folder) for folder in sorted(adapters.iterdir())]
    cli.main(
        ["convert", "--base", str(base), "--adapters", *folders, "--out", str(out)]
    )
    return out


@pytest.fixture(scope="module")
def pool(small, tmp_path_factory) -> Path:
    return _convert(*small, tmp_path_factory.mktemp("pool") / "pool")


def _fuse(base: Path, pool: Path, out: Path) -> Path:
    options = [
        "--base",
        str(base),
        "--pool",
        str(pool),
        "--seeds",
        "1",
        "2",
        "--out",
        str(out),
        "--name",
        "r",
    ]
    cli.main([*_FUSE, *_QUICK, *options])
    return out / "r"


@pytest.fixture(scope="module")
def run(small, pool, tmp_path_factory) -> Path:
    return _fuse(small[0], pool, tmp_path_factory.mktemp("runs"))


@pytest.mark.smoke
def test_convert_writes_all_adapters_of_the_embedded_pool(tmp_path):
    _convert(_SMALL / "base", _SMALL / "adapters", tmp_path / "pool")
    manifest = json.loads((tmp_path / "pool" / "manifest.json").read_text())
    assert len(manifest["adapters"]) == 28


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
        cli.main(["evaluate", "--run", str(run), "--task", str(task)])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert [line.split()[0] for line in printed[0].splitlines()] == [
        "seed",
        "1",
        "2",
        "mean",
    ]


def test_errors_are_one_message_and_exit_code_2(run, tmp_path, capsys):
    fuse = [*_FUSE, "--base", str(_SMALL / "base")]
    chips = ["evaluate", "--run", str(run), "--crossbar", "isaac"]
    for arguments, message in [
        (
            [*fuse, "--adapters", "0", "--modules", "3"],
            "--adapters names the modules: leave it out, or --modules",
        ),
        (
            ["export", "--out", str(tmp_path / "x")],
            "nothing to export: give one of --run RUN, --pool POOL --adapter NAME, and --base",
        ),
        (
            [
                "export",
                "--base",
                "owner/a",
                "--run",
                str(run),
                "--out",
                str(tmp_path / "x"),
            ],
            "nothing to export: give one of",
        ),
        (
            [
                "export",
                "--pool",
                str(tmp_path),
                "--adapter",
                "a",
                "--format",
                "gguf",
                "--out",
                str(tmp_path / "x"),
            ],
            "--format: only for a run, because an adapter of a pool is saved as it came: `lorafusion merge` writes",
        ),
        (["evaluate", "--run", str(tmp_path)], ": not a run: it has no config.json"),
        (
            [*chips, "--ages", "1h", "1day", "--report"],
            "a report is of one age: give one of --ages",
        ),
        (
            [*chips, "--keep-digital", "embedding", "--report"],
            "the rule 'embedding' matches no weight",
        ),
        (
            ["generate", "--base", "owner/b", "--top-p", "0.9"],
            "top_k and top_p filter a draw, and temperature 0 draws",
        ),
    ]:
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a | {"coefficients": a["coefficients"][:1]},
            "has an array of shape (1,",
        ),
        (
            lambda a: a | {"coefficients": a["coefficients"][..., :1]},
            "coefficients is float32[",
        ),
        (
            lambda a: a | {"coefficients": a["coefficients"].astype("int32")},
            "coefficients is int32[",
        ),
        (
            lambda a: {"coefficients": a["coefficients"]},
            " is absent: expected float32[",
        ),
        (lambda a: a | {"others": a["coefficients"]}, "others is float32["),
    ],
)
def test_trained_numbers_of_other_shapes_under_a_right_digest_are_refused(
    run, change, message, tmp_path, capsys
):
    folder = shutil.copytree(run, tmp_path / "run")
    save_file(change(load_file(file := folder / "final" / "arrays.safetensors")), file)
    manifest = json.loads((folder / "final" / "manifest.json").read_text())
    manifest["files"][file.name] = sha256(file)
    (folder / "final" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "lines").write_text('{"input": "a b"}')
    for command in (
        ["evaluate", "--run"],
        ["generate", "--file", str(tmp_path / "lines"), "--run"],
        ["generate", "--file", str(tmp_path / "lines"), "--runs"],
        ["export", "--out", str(tmp_path / "x"), "--run"],
    ):
        with pytest.raises(SystemExit):
            cli.main([*command, str(folder)])
        assert (
            f"error: {folder / 'final'}: " in (error := capsys.readouterr().err)
            and message in error
        )


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
