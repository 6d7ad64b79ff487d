"""The public names: each is documented, and is on one page."""

import collections
import importlib
import pkgutil
import re
import types
from pathlib import Path

import lorafusion_jax as lf
from lorafusion_jax import crossbar, tasks
from lorafusion_jax.crossbar import flax as crossbar_flax

_API_PAGES = Path(__file__).resolve().parent.parent / "docs" / "reference" / "api"
_DOORS = "adapters estimates hardware io loading models runs training trials".split()


def test_public_names_are_documented_and_no_submodule_replaces_them():
    for module in pkgutil.walk_packages(lf.__path__, "lorafusion_jax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in set(lf.__all__) - {"crossbar", "PRESETS"}:
        value = getattr(lf, name)
        assert value.__doc__ and not isinstance(value, types.ModuleType), name
    for door in _DOORS:
        for name, value in vars(getattr(lf, door)).items():
            is_documented = value.__doc__ or not isinstance(
                value, type | types.FunctionType
            )
            assert is_documented, f"{door}.{name}"


def test_every_public_name_is_on_one_api_page():
    documented = collections.Counter()
    for page in _API_PAGES.glob("*.md"):
        module = ""
        for directive, name in re.findall(
            r"^\.\. (?:auto|py:)?(\w+):: (\S+)$", page.read_text(), re.MULTILINE
        ):
            if directive == "currentmodule":
                module = name
            elif directive != "module":
                documented[f"{module}.{name}"] += 1
    names = [
        f"{module.__name__}.{name}"
        for module in (crossbar, crossbar_flax, tasks)
        for name in module.__all__
    ]
    # The names that the package takes from its crossbar library are described there.
    names += [
        f"{lf.__name__}.{name}"
        for name in set(lf.__all__) - {"crossbar"}
        if getattr(crossbar, name, None) is not getattr(lf, name)
    ]
    assert documented == collections.Counter(names)
