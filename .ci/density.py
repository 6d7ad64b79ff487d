"""Refuse dense code that ruff has no rule for: python .ci/density.py FOLDER ... (see CONTRIBUTING.md).

* `a, b = x, y`: a line for each value, except where a value reads a target, as in a swap;
* `a, b = (f(x) for x in pair)`: a line for each name;
* `options = {...}` and `f(**options)`, or `f(**{...})`, with a function of the package or of the same file: keywords
  are written out, where the type checker sees them;
* a conditional expression within another one: an `if` statement.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = "lorafusion_jax"
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
Scope = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda


def violations(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the fault of every dense form in a file."""
    ours = _functions(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            starred = isinstance(node.targets[0].elts[-1], ast.Starred)
            if isinstance(node.value, ast.GeneratorExp | ast.ListComp) and not starred:
                yield node.lineno, "unpacks a generator: write a line for each name"
            if isinstance(node.value, ast.Tuple) and not _reads_target(node):
                yield node.lineno, "assigns several values: write a line for each"
        if isinstance(node, ast.IfExp) and any(
            isinstance(part, ast.IfExp) for part in ast.walk(node) if part is not node
        ):
            yield node.lineno, "nests conditional expressions: write an if statement"
    for scope in [
        tree,
        *(node for node in ast.walk(tree) if isinstance(node, _SCOPES)),
    ]:
        yield from _unpacked_keywords(scope, ours)


def _functions(tree: ast.Module) -> set[str]:
    """Return names of functions, classes and modules that are the package's, or defined in this file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").startswith(_PACKAGE)
        ):
            names |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.startswith(_PACKAGE)]
            names |= {alias.asname or _PACKAGE for alias in ours}
    return names


def _reads_target(node: ast.Assign) -> bool:
    """Return whether a value of an assignment contains one of its targets."""
    values = {ast.unparse(part) for part in ast.walk(node.value)}
    assert isinstance(node.targets[0], ast.Tuple)
    return any(ast.unparse(target) in values for target in node.targets[0].elts)


def _unpacked_keywords(scope: Scope, ours: set[str]) -> Iterator[tuple[int, str]]:
    nodes = [*_within(scope)]
    literals = {
        node.targets[0].id
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Dict)
        and isinstance(node.targets[0], ast.Name)
    }
    for node in nodes:
        if not isinstance(node, ast.Call) or _root(node.func) not in ours:
            continue
        for value in [word.value for word in node.keywords if word.arg is None]:
            if isinstance(value, ast.Dict) or ast.unparse(value) in literals:
                yield node.lineno, "unpacks a dictionary: write the keywords out"


def _root(function: ast.expr) -> str:
    """Return the first name of a dotted function: `lf` of `lf.tasks.encode`."""
    return ast.unparse(function).partition(".")[0]


def _within(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a scope without those of the scopes in it."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, _SCOPES):
            yield node
            yield from _within(node)


def main() -> int:
    lines = [
        f"{path}:{line}: {fault}"
        for folder in sys.argv[1:]
        for path in sorted(Path(folder).rglob("*.py"))
        for line, fault in sorted(violations(ast.parse(path.read_text())))
    ]
    print(*lines, sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
