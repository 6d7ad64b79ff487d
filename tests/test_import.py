"""Importing loads nothing heavy and starts no backend, and imports inside the package only run downwards."""

import ast
import functools
import graphlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = "lorafusion_jax"
_HEAVY = set(
    "datasets huggingface_hub matplotlib orbax peft torch tqdm transformers".split()
)
# What each folder may import besides itself and `support`; later folders stand on earlier ones.
_LAYERS = """
support:
crossbar:
tasks:
report:
models: crossbar
adapters: models
io: models adapters
training: models adapters tasks
methods: models adapters tasks training
loading: models adapters io tasks training methods
runs: loading models adapters io tasks report training methods
serving: loading models adapters io tasks training methods runs
hardware: loading crossbar models adapters io tasks training methods runs
estimates: loading crossbar models adapters io tasks training methods runs
trials: io loading methods runs report tasks training estimates
lm_eval: loading models io tasks training runs hardware
cli: crossbar io tasks report training methods runs serving hardware estimates lm_eval trials
"""
_MAY_IMPORT = {
    line.partition(":")[0]: set(line.partition(":")[2].split())
    for line in _LAYERS.strip().splitlines()
}

_PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):  # the package loads its public names when they are asked for
        getattr(module, public)
from jax._src import xla_bridge
print(json.dumps([xla_bridge.backends_are_initialized(), [name.partition(".")[0] for name in sys.modules]]))
"""


def _modules():
    """Return the file of every module of the package, by its dotted name."""
    modules = {}
    for path in sorted((_ROOT / _PACKAGE).rglob("*.py")):
        parts = path.relative_to(_ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


@functools.cache
def _imports(name, path, *, on_load=False):
    """Return the names that a module imports, `from a import b` as `a.b`; on_load: only when it is loaded."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -node.level + 1 or None] * bool(node.level)
            origin = [*parents, *([node.module] if node.module else [])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)
        deferred = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(
            node.test
        )
        if not (on_load and (for_types or isinstance(node, deferred))):
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    return tuple(visit(ast.parse(path.read_text(), str(path))))


def _within(targets, modules):
    """Yield the modules of the package among imported names."""
    for target in targets:
        if target.partition(".")[0] == _PACKAGE:
            while target not in modules:
                target = target.rpartition(".")[0]
            yield target


@pytest.mark.smoke
def test_no_module_starts_a_backend_or_loads_heavy_libraries():
    modules = [
        name for name in _modules() if not name.endswith(("__main__", ".lm_eval.model"))
    ]
    command = [sys.executable, "-W", "error", "-c", _PROBE, *modules]
    printed = subprocess.run(command, cwd=_ROOT, capture_output=True, check=True).stdout
    backend_is_started, loaded = json.loads(printed)
    assert not backend_is_started and not _HEAVY & set(loaded)


_WITHOUT_JAX = {"jax", "numpy", "scipy", "yaml", *_HEAVY}
_SMALL = _ROOT / "examples" / "small"
# What commands do not load: heavy libraries before a signal is handled, JAX for a help text or a wrong path.
_NOT_LOADED = {
    "": {"tyro", *_WITHOUT_JAX},
    "trial --help": _WITHOUT_JAX,
    "fuse --base nowhere --task nowhere": _WITHOUT_JAX,
    # The programs are those of the README's first example.
    f"fuse --base {_SMALL}/base --pool {_SMALL}/adapters --task {_SMALL}/tasks/pairswap_numvow --modules 4 --epochs 1 "
    "--train-rows 20 --test-rows 4": {
        *_HEAVY - {"tqdm"},
        "gguf",
        "pandas",
        "pyarrow",
        "scipy",
    },
}


@pytest.mark.parametrize("call", _NOT_LOADED)
def test_commands_load_only_what_they_need(call, tmp_path):
    code = """
import contextlib, io, sys
from lorafusion_jax import cli
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    if sys.argv[1:]:
        cli.main()
print(*sys.modules)
"""
    printed = subprocess.run(
        [sys.executable, "-c", code, *call.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert not _NOT_LOADED[call] & set(printed.split())


def test_every_library_that_the_package_imports_is_declared():
    """PyTorch and PEFT are not."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [extras[name][0] for name in ("plots", "lorahub", "lm-eval", "ray")]
    requirements = [*project["dependencies"], *optional]
    declared = {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}
    distributions = importlib.metadata.packages_distributions()
    imported = {
        target.partition(".")[0]
        for name, path in _modules().items()
        for target in _imports(name, path)
    }
    for root in sorted(imported - {*sys.stdlib_module_names, _PACKAGE}):
        libraries = distributions.get(root, [root])
        names = {re.sub("[-_.]+", "-", library).lower() for library in libraries}
        assert names & declared, f"{root} is not declared in pyproject.toml"


def test_imports_run_downwards():
    modules = _modules()
    imported = set()
    for name, path in modules.items():
        if name in (_PACKAGE, f"{_PACKAGE}._api"):
            continue
        folder = name.split(".")[1]
        assert folder in _MAY_IMPORT, f"{folder} lacks a line in the table of layers"
        for target in _within(_imports(name, path), modules):
            below = target.removeprefix(_PACKAGE).strip(".").partition(".")[0]
            assert below in _MAY_IMPORT[folder] | {folder, "support"}, (
                f"{name} imports {target}"
            )
            imported.add((folder, below))
    folders = list(_MAY_IMPORT)
    for place, (folder, below) in enumerate(_MAY_IMPORT.items()):
        assert below <= set(folders[:place]), f"{folder} stands above what it imports"
        assert all((folder, name) in imported for name in below), (
            f"{folder} imports less than the table allows"
        )


def test_imports_form_no_cycle():
    modules = _modules()
    graph = {name: set() for name in modules}
    for name, path in modules.items():
        for target in _within(_imports(name, path, on_load=True), modules):
            # Importing a.b.c runs a and a.b first, unless the importing module lies inside them.
            while target and not f"{name}.".startswith(f"{target}."):
                graph[name].add(target)
                target = target.rpartition(".")[0]
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the cycle


# All names that are not public but that experiments, benchmarks and examples import, each with its reason.
_INTERNAL = {
    "lorafusion_jax.support.interrupts": "a script handles Ctrl-C before the public names are loaded",
    "lorafusion_jax.cli.run": "the same",
    "lorafusion_jax.crossbar.read.definition": "the oracle of the read paths, which fast paths are measured against",
}


def test_scripts_import_public_names():
    doors = _MAY_IMPORT.keys() - {"support", "serving", "lm_eval", "cli"}
    public = {_PACKAGE, *(f"{_PACKAGE}.{door}" for door in doors)}
    public.add(f"{_PACKAGE}.crossbar.flax")
    modules = _modules().keys() - public
    internal = set()
    for folder in ("experiments", "benchmarks", "examples"):
        for path in (_ROOT / folder).rglob("*.py"):
            attributes = re.findall(r"\blf\.(\w+)\.", path.read_text())
            internal |= modules & {f"{_PACKAGE}.{name}" for name in attributes}
            for name in set(_imports(path.stem, path)) - public:
                namespace = name.rpartition(".")[0]
                if name.partition(".")[0] == _PACKAGE:
                    if namespace not in public or (
                        namespace == _PACKAGE and name in modules
                    ):
                        internal.add(name)
    assert sorted(internal) == sorted(_INTERNAL)
