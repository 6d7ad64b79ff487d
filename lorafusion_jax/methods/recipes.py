"""Parts of recipes that several methods share, and a recipe made of the fields of another one."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ..support.options import BasisOptions, DrawOptions
from ..training.recipe import Recipe

OneRecipe = TypeVar("OneRecipe", bound=Recipe)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolRecipe(DrawOptions, Recipe):
    """Recipe of a method that fuses modules of a pool."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasisRecipe(BasisOptions, PoolRecipe):
    """Recipe of a method that fuses modules, whole or in a shared basis.

    Attributes:
      basis: fuse the modules in the first so many directions of the pool's stored basis (`lorafusion convert --basis`);
        None for whole modules.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetedRecipe(Recipe):
    """Recipe of a method without a pool, which adapts linear maps of the base model.

    Attributes:
      lora_targets: the linear maps that are adapted, wherever they occur; by default the model family's own choice.
    """

    lora_targets: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RescalingRecipe(Recipe):
    """Recipe of a method that trains magnitudes.

    Attributes:
      lr_magnitudes: learning rate of the magnitudes.
    """

    lr_magnitudes: float = 0.01


def modules_of(recipe: Recipe) -> int:
    """Return the number of modules that a seed fuses; 0 for a method without a pool."""
    return recipe.modules if isinstance(recipe, PoolRecipe) else 0


def basis_of(recipe: Recipe) -> int | None:
    """Return the number of directions of the shared basis; None for whole modules."""
    return recipe.basis if isinstance(recipe, BasisRecipe) else None


def recipe_of(kind: type[OneRecipe], values: Mapping[str, Any]) -> OneRecipe:
    """Return a recipe of a class with its fields from values such as the `vars` of another recipe."""
    return kind(
        **{
            field.name: values[field.name]
            for field in dataclasses.fields(kind)
            if field.name in values
        }
    )
