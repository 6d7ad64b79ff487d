"""Recipes of any method, and options with one, from numbers that several methods share."""

from typing import Any

from lorafusion_jax.methods import METHODS, fields_of
from lorafusion_jax.methods.recipes import recipe_of
from lorafusion_jax.runs.options import FuseOptions
from lorafusion_jax.training.recipe import Recipe

_NUMBERS = {name for entry in METHODS.values() for name in fields_of(entry)}


def recipe(method: str = "fusion", **numbers: Any) -> Recipe:
    """The recipe of a method with those of the numbers that it has."""
    return recipe_of(METHODS[method].recipe, numbers)


def options(numbers: dict[str, Any], **values: Any) -> FuseOptions:
    """Options of a run, whose recipe is of those of the numbers that its method has; values may be numbers too."""
    numbers = numbers | {name: values.pop(name) for name in [*values] if name in _NUMBERS}
    return FuseOptions(**values, recipe=recipe(values.get("method", "fusion"), **numbers))
