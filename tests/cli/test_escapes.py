"""What a terminal would obey in names of files, folders, tasks and modules reaches it as text."""

import ast
import shutil
from pathlib import Path

import pytest
import recipes

from lorafusion_jax import cli

_ESCAPE = "\x1b[31m"
# They print no names: help, and answers, which another program gets as they are.
_PLAIN = {"__init__.py", "generate.py", "start.py"}


def test_commands_print_by_one_function():
    files = [path for path in Path(cli.__file__).parent.glob("*.py") if path.name not in _PLAIN]
    calls = (node for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    assert len(files) > 10 and not [call.lineno for call in calls if ast.unparse(call.func) == "print"]


@pytest.mark.long
def test_every_command_escapes_the_names_that_it_prints(small, tmp_path, capsys, monkeypatch):
    home = tmp_path / f"home{_ESCAPE}"
    base, task = shutil.copytree(small[0], home / "base"), shutil.copytree(recipes.TASK, home / f"task{_ESCAPE}")
    adapters = [shutil.copytree(path, home / f"{path.name}{_ESCAPE}") for path in sorted(small[1].iterdir())]
    (home / "lines.txt").write_text("".join(f"double then digit : {n} a b\n" for n in range(24)))
    monkeypatch.chdir(tmp_path)
    quick = ["--modules", "2", "--epochs", "1", "--batch-size", "48", "--max-new-tokens", "8", "--test-rows", "5"]
    fuse = ["fuse", "--base", base, "--pool", home / "pool", "--task", task, "--out", home, *quick]
    run, chips, few = home / f"one{_ESCAPE}", home / "chips", ["--keep-digital", "head", "*.ff.*", "*.k", "*.o"]
    for arguments in (
        ["convert", "--base", base, "--adapters", *adapters, "--out", home / "pool"],
        [*fuse, "--name", run.name],
        [*fuse, "--name", f"two{_ESCAPE}", "--seeds", "2"],
        [*fuse, "--name", "three", "--plan"],
        ["compare", run, home / f"two{_ESCAPE}"],
        ["evaluate", "--run", run],
        ["evaluate", "--runs", run],
        ["export", "--run", run, "--out", home / "exported"],
        [
            "merge",
            "--base",
            base,
            "--pool",
            home / "pool",
            "--out",
            home / "merged",
            "--weights",
            f"{adapters[0].name}=1",
        ],
        ["params", "--shape", base],
        ["cost", "--shape", base, "--json", home / "cost.json"],
        ["crossbar", "program", "--base", base, "--pool", home / "pool", "--crossbar", "ideal", "--out", chips, *few],
        ["evaluate", "--run", run, "--crossbar", chips],
        ["restore", "--base", base, "--crossbar", chips, "--text", home / "lines.txt", "--epochs", "0"],
        ["evaluate", "--run", home],
    ):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            assert (stop.code, arguments[-1]) == (2, home)
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err and len(printed.out + printed.err) > 20, arguments[0]
