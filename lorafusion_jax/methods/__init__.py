"""The methods that can be trained or compared, by name. A new one is a file, and a line here."""

import dataclasses

from . import base_alone, fusion, lora, lorahub, merge, vera
from .base_alone import FullFineTuning as FullFineTuning, Magnitudes as Magnitudes
from .entry import (
    Built as Built,
    MethodEntry,
    PoolRecipe,
    basis_of as basis_of,
    modules_of as modules_of,
    recipe_of as recipe_of,
)
from .fusion import choice_of as choice_of
from .vera import VeRA as VeRA

METHODS: dict[str, MethodEntry] = {}


def register(*entries: MethodEntry) -> None:
    """Add methods to the registry: runs, counts, plans and costs then have them.

    Raises:
      ValueError: a name is taken, or the recipe of a method that fuses a pool has no number of modules.
    """
    for entry in entries:
        if entry.name in METHODS:
            raise ValueError(
                f"there is a method {entry.name!r} already: give this one another name"
            )
        if entry.pool and not issubclass(entry.recipe, PoolRecipe):
            raise ValueError(
                f"method {entry.name} fuses a pool: let {entry.recipe.__name__} inherit from PoolRecipe"
            )
        METHODS[entry.name] = entry


def find(name: str) -> MethodEntry:
    """Return a method of the registry; raises a ValueError for an unknown name."""
    if name not in METHODS:
        raise ValueError(f"no method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def having(number: str) -> list[str]:
    """Return the names of the methods whose recipe has a field of this name."""
    return [name for name, entry in METHODS.items() if number in fields_of(entry)]


def not_an_option(number: str, method: str) -> str:
    """Return an error text about an option that the method does not have."""
    methods = having(number)
    kind = "the method" if len(methods) == 1 else "the methods"
    return f"an option of {kind} {', '.join(methods)}, not of {method}: leave it out, or choose another method"


def fields_of(entry: MethodEntry) -> list[str]:
    """Return the names of all fields of a method's recipe."""
    return [field.name for field in dataclasses.fields(entry.recipe)]


register(
    *fusion.ENTRIES,
    base_alone.MAGNITUDES,
    *lora.ENTRIES,
    *vera.ENTRIES,
    *lorahub.ENTRIES,
    base_alone.FULL,
    *merge.ENTRIES,
    *base_alone.UNTRAINED,
)
