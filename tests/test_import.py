"""Importing loads nothing heavy and touches no device, and imports inside the package only run downwards."""

import ast
import graphlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = "lorafusion_jax"
_HEAVY = set(
    "datasets huggingface_hub matplotlib orbax peft torch tqdm transformers".split()
)

# What every part may import.
_ANYWHERE = {"support"}
# What each room may import besides itself and `_ANYWHERE`; later rooms stand on earlier ones.
_MAY_IMPORT = {
    "support": set(),
    "crossbar": set(),
    "tasks": set(),
    "report": set(),
    "models": {"crossbar"},
    "adapters": {"models"},
    "io": {"models", "adapters"},
    "training": {"models", "adapters", "tasks"},
    "methods": {"models", "adapters", "tasks", "training"},
    "loading": {"models", "adapters", "io", "tasks", "training", "methods"},
    "runs": {
        "loading",
        "models",
        "adapters",
        "io",
        "tasks",
        "report",
        "training",
        "methods",
    },
    "serving": {
        "loading",
        "models",
        "adapters",
        "io",
        "tasks",
        "training",
        "methods",
        "runs",
    },
    "hardware": {
        "loading",
        "crossbar",
        "models",
        "adapters",
        "io",
        "tasks",
        "training",
        "methods",
        "runs",
    },
    "estimates": {
        "loading",
        "crossbar",
        "models",
        "adapters",
        "io",
        "tasks",
        "training",
        "methods",
        "runs",
    },
    "trials": set(
        "hardware io loading methods runs report tasks training estimates".split()
    ),
    "lm_eval": {"loading", "models", "io", "tasks", "training", "runs", "hardware"},
    "cli": set(
        "crossbar io report training methods runs serving hardware estimates lm_eval trials".split()
    ),
}

_PROBE = """
import importlib, json, sys
def probe(names):
    for name in names:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):  # the package loads its public names when they are asked for
            getattr(module, public)
    from jax._src import xla_bridge
    return {
        "backend": xla_bridge.backends_are_initialized(),
        "roots": sorted({name.partition(".")[0] for name in sys.modules}),
    }
package, *modules = sys.argv[1:]
print(json.dumps([probe([package]), probe(modules)]))
"""


def _probe(*modules: str) -> list[dict]:
    """Import the package, then the modules, in a fresh interpreter: backend started, modules loaded."""
    command = [sys.executable, "-W", "error", "-c", _PROBE, _PACKAGE, *modules]
    done = subprocess.run(
        command, cwd=_ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    names = {}
    for path in sorted((_ROOT / _PACKAGE).rglob("*.py")):
        parts = path.relative_to(_ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def _imports(name: str, path: Path, *, on_load: bool = False) -> Iterator[str]:
    """Dotted names that a module imports, `from a import b` as `a.b`; on_load: only when it is loaded."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(path.read_text(), str(path))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = (
                ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            )
            origin = ".".join(part for part in (base, node.module) if part)
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            yield from (
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)
            )
        if not (on_load and _is_deferred(node)):
            pending.extend(ast.iter_child_nodes(node))


def _is_deferred(node: ast.AST) -> bool:
    """Whether loading a module passes over this node's body: a function, or annotations' imports."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _own_modules(imported: Iterator[str], modules: dict[str, Path]) -> Iterator[str]:
    """Keeps imports of the package itself, cut back to the module that holds the imported name."""
    for target in imported:
        if target.partition(".")[0] == _PACKAGE:
            while target not in modules:
                target = target.rpartition(".")[0]
            yield target


@pytest.mark.smoke
def test_no_module_starts_a_backend_or_loads_heavy_libraries():
    probes = _probe(
        *(
            name
            for name in _modules()
            if not name.endswith(("__main__", ".lm_eval.model"))
        )
    )
    for probe in probes:
        assert not probe["backend"]
        assert not _HEAVY & set(probe["roots"])


def test_a_command_handles_signals_before_it_loads_anything_heavy():
    code = "import sys; import lorafusion_jax.cli, lorafusion_jax.support.interrupts; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert not {"jax", "numpy", "scipy", "yaml", "tyro", *_HEAVY} & set(loaded.split())


def test_torch_and_peft_are_never_imported():
    modules = _modules()
    found = [
        f"{name} imports {target}"
        for name, path in modules.items()
        for target in _imports(name, path)
        if target.partition(".")[0] in ("torch", "peft")
    ]
    assert modules and not found


def test_every_library_that_the_package_imports_is_declared():
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    of_extras = (extras[name][0] for name in ("plots", "lorahub", "lm-eval", "ray"))
    requirements = [*project["dependencies"], *of_extras]
    declared = {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}
    distributions = importlib.metadata.packages_distributions()
    imported = {
        target.partition(".")[0]
        for name, path in _modules().items()
        for target in _imports(name, path)
    }
    undeclared = []
    for root in sorted(imported - {*sys.stdlib_module_names, _PACKAGE, ""}):
        libraries = {
            re.sub("[-_.]+", "-", name).lower()
            for name in distributions.get(root, [root])
        }
        if not libraries & declared:
            undeclared.append(root)
    assert {"jax", "numpy"} <= imported and not undeclared


def test_imports_run_downwards():
    modules = _modules()
    wrong = []
    imported = set()
    for name, path in modules.items():
        if name in (_PACKAGE, f"{_PACKAGE}._api"):
            continue
        part = name.split(".")[1]
        assert part in _MAY_IMPORT, (
            f"{part} has no place among the layers yet: say what it may import"
        )
        for target in _own_modules(_imports(name, path), modules):
            if (
                target == _PACKAGE
                or target.split(".")[1] not in _MAY_IMPORT[part] | {part} | _ANYWHERE
            ):
                wrong.append(f"{name} imports {target}")
            imported.add((part, target.removeprefix(f"{_PACKAGE}.").partition(".")[0]))
    assert not wrong
    allowed = {(part, other) for part, below in _MAY_IMPORT.items() for other in below}
    assert allowed <= imported  # the table has no more than is needed
    assert (
        len(_MAY_IMPORT) <= 20 and sum(part != other for part, other in imported) <= 105
    )


def test_rooms_stand_on_each_other_in_one_order():
    rooms = list(_MAY_IMPORT)
    for place, (room, below) in enumerate(_MAY_IMPORT.items()):
        assert below <= set(rooms[:place]), room


def test_imports_form_no_cycle():
    modules = _modules()
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        for target in _own_modules(_imports(name, path, on_load=True), modules):
            # Importing a.b.c runs a and a.b first, unless the importing module lies inside them.
            while target and not f"{name}.".startswith(f"{target}."):
                graph[name].add(target)
                target = target.rpartition(".")[0]
    graphlib.TopologicalSorter(
        graph
    ).prepare()  # raises CycleError, which names the cycle


# Namespaces that scripts may import from.
_PUBLIC = {
    _PACKAGE,
    *(
        f"{_PACKAGE}.{name}"
        for name in _MAY_IMPORT.keys() - {"support", "serving", "lm_eval", "cli"}
    ),
}
_PUBLIC.add(f"{_PACKAGE}.crossbar.flax")
# All other names that experiments and benchmarks import, each with its reason.
_INTERNAL = {
    "lorafusion_jax.support.interrupts": "a script handles Ctrl-C before the public names are loaded",
    "lorafusion_jax.cli.run": "the same",
    "lorafusion_jax.crossbar.chip.plan.Split": "arrays that a run splits over a mesh, compiled for absent devices",
    "lorafusion_jax.crossbar.read.definition": "the oracle of the read paths, which fast paths are measured against",
    "lorafusion_jax.tasks.packing.MOST_SHAPES": "the bar of a benchmark",
}


def test_experiments_and_benchmarks_import_public_names():
    files = [
        path
        for folder in ("experiments", "benchmarks", "examples")
        for path in (_ROOT / folder).rglob("*.py")
    ]
    modules = _modules().keys() - _PUBLIC
    attributes = {
        name
        for path in files
        for name in re.findall(r"\blf\.(\w+)\.", path.read_text())
    }
    found = modules & {f"{_PACKAGE}.{name}" for name in attributes}
    imported = {target for path in files for target in _imports(path.stem, path)}
    own = {target for target in imported if target.partition(".")[0] == _PACKAGE}
    for name in own - _PUBLIC:
        namespace = name.rpartition(".")[0]
        if namespace not in _PUBLIC or (namespace == _PACKAGE and name in modules):
            found.add(name)
    assert sorted(found) == sorted(_INTERNAL)
