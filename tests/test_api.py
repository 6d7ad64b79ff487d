"""The public names: each exists once, is documented, and is on one page."""

import collections
import importlib
import pkgutil
import re
import types
from pathlib import Path

import pytest

import lorafusion_jax as lf
from lorafusion_jax import crossbar, tasks
from lorafusion_jax.crossbar import flax as crossbar_flax

_ROOT = Path(__file__).resolve().parent.parent
_API_PAGES = _ROOT / "docs" / "reference" / "api"
# Packages whose names are described whole.
_DOORS = (
    *("adapters", "estimates", "hardware", "io", "loading", "models", "runs"),
    *("training", "trials"),
)


def test_every_public_name_exists_once_and_is_documented():
    assert len(set(lf.__all__)) == len(lf.__all__) and {
        "fuse",
        "LoraPool",
        "crossbar",
    } <= {*lf.__all__}
    for name in lf.__all__:
        assert getattr(lf, name).__doc__ or name == "PRESETS", name
    for door in _DOORS:
        for name, value in vars(getattr(lf, door)).items():
            documented = value.__doc__ or not isinstance(
                value, type | types.FunctionType
            )
            assert documented, f"{door}.{name}"
    found = lf.Batch
    assert vars(lf)["Batch"] is found and dir(lf).count("Batch") == 1


def test_every_public_name_is_on_one_api_page():
    found = collections.Counter()
    for page in _API_PAGES.glob("*.md"):
        module = ""
        for directive, name in re.findall(
            r"^\.\. (?:auto|py:)?(\w+):: (\S+)$", page.read_text(), re.MULTILINE
        ):
            if directive == "currentmodule":
                module = name
            elif directive != "module":
                found[f"{module}.{name}"] += 1
    names = [
        f"{module.__name__}.{name}"
        for module in (crossbar, crossbar_flax, tasks)
        for name in module.__all__
    ]
    # The names that the package takes from its crossbar library are described there.
    own = (name for name in lf.__all__ if name != "crossbar")
    names += [
        f"{lf.__name__}.{name}"
        for name in own
        if getattr(crossbar, name, None) is not getattr(lf, name)
    ]
    assert found == collections.Counter(names)


def test_names_of_tasks_that_pages_and_examples_use_are_exported():
    """Type checkers refuse other names of a typed package."""
    files = [*_ROOT.glob("docs/**/*.md"), *_ROOT.glob("examples/*.py")]
    used = {
        name
        for file in files
        for name in re.findall(r"\btasks\.(\w+)\(", file.read_text())
    }
    assert {"load_task", "pad"} <= used <= {*tasks.__all__}


def test_no_submodule_replaces_a_public_name():
    for module in pkgutil.walk_packages(lf.__path__, "lorafusion_jax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with pytest.raises(ValueError, match="seeds"):
        lf.fuse(lf.FuseOptions(base="base", task="task", seeds=()))
    assert all(
        type(getattr(lf, name)) is not type(importlib) or name == "crossbar"
        for name in lf.__all__
    )
