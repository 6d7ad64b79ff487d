"""What a terminal would obey in names of files, folders, tasks and modules reaches it as text."""

import ast
from pathlib import Path

from lorafusion_jax import cli

# They print no names: help, and answers, which another program gets as they are.
_PLAIN = {"__init__.py", "generate.py", "start.py"}


def test_commands_print_by_one_function():
    files = [
        path
        for path in Path(cli.__file__).parent.glob("*.py")
        if path.name not in _PLAIN
    ]
    calls = (
        node
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    )
    assert len(files) > 10 and not [
        call.lineno for call in calls if ast.unparse(call.func) == "print"
    ]
