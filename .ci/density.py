"""Refuse dense code that ruff has no rule for: python .ci/density.py FOLDER ...

* `a, b = x, y`, unless a value reads a target, as in a swap;
* `a, b = (f(x) for x in pair)`;
* `options = {...}` and `f(**options)` with a function of the package or of this file: nobody checks the types;
* a conditional expression within another one.
"""

import ast
import keyword
import sys
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = "lorafusion_jax"


def violations(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the fault of every dense form in a file."""
    ours = _functions(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            names = node.targets[0].elts
            starred = any(isinstance(name, ast.Starred) for name in names)
            generated = isinstance(node.value, ast.GeneratorExp | ast.ListComp)
            if generated and len(names) > 1 and not starred:
                yield node.lineno, "unpacks a generator: write a line for each name"
            if isinstance(node.value, ast.Tuple) and not _reads_target(node):
                yield node.lineno, "assigns several values: write a line for each"
        if isinstance(node, ast.IfExp):
            if sum(isinstance(part, ast.IfExp) for part in ast.walk(node)) > 1:
                yield (
                    node.lineno,
                    "nests conditional expressions: write an if statement",
                )
        if isinstance(node, ast.FunctionDef):
            yield from _unpacked_keywords(node, ours)


def _functions(tree: ast.Module) -> set[str]:
    """Return the names in a file that are the package's or the file's own."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            if node.level or (node.module or "").startswith(_PACKAGE):
                names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.startswith(_PACKAGE)]
            names |= {alias.asname or _PACKAGE for alias in ours}
    return names


def _reads_target(node: ast.Assign) -> bool:
    """Return whether a value of an assignment contains one of its targets."""
    values = {ast.unparse(part) for part in ast.walk(node.value)}
    assert isinstance(node.targets[0], ast.Tuple)
    return any(ast.unparse(target) in values for target in node.targets[0].elts)


def _unpacked_keywords(
    function: ast.FunctionDef, ours: set[str]
) -> Iterator[tuple[int, str]]:
    literals = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and _are_keywords(node.value):
            literals |= {ast.unparse(target) for target in node.targets}
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func).partition(".")[0] not in ours:
            continue
        for value in [word.value for word in node.keywords if word.arg is None]:
            if _are_keywords(value) or ast.unparse(value) in literals:
                yield node.lineno, "unpacks a dictionary: write the keywords out"


def _are_keywords(node: ast.expr) -> bool:
    """Return whether a node is a dictionary whose keys could be written as keywords."""
    return isinstance(node, ast.Dict) and all(
        isinstance(key, ast.Constant)
        and str(key.value).isidentifier()
        and not keyword.iskeyword(str(key.value))
        for key in node.keys
    )


if __name__ == "__main__":
    lines = [
        f"{path}:{line}: {fault}"
        for folder in sys.argv[1:]
        for path in sorted(Path(folder).rglob("*.py"))
        for line, fault in sorted(set(violations(ast.parse(path.read_text()))))
    ]
    sys.exit("\n".join(lines) or None)
