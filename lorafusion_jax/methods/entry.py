"""Entries of the registry of methods, and the parts of recipes that several methods share."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from ..adapters.basis import Pool
from ..models.architecture import Architecture, Site, targeted
from ..support.options import BasisOptions, DrawOptions
from ..tasks import TrainingRows
from ..training.method import Method, Params
from ..training.problem import Problem
from ..training.recipe import Recipe

Matrix = tuple[int, int]
Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostLayout:
    """Places of a method's matrices in hardware: a row of the energy table.

    Attributes:
      matrices: function from a site to the matrices of its adapter that answers read from arrays, A before B; for a
        method that trains the base, these are the base's.
      digital: function from a site to the matrices of its adapter that are multiplied digitally.
      written: writes of the matrices in arrays for a task, which trains them.
      trains_in_arrays: forward passes of training read them from arrays too.
    """

    matrices: Callable[[Site], list[Matrix]] = lambda site: []
    digital: Callable[[Site], list[Matrix]] = lambda site: []
    written: Literal["never", "once", "every step"] = "never"
    trains_in_arrays: bool = False


class Built(NamedTuple):
    """Arguments that a method is built from.

    Attributes:
      config: structure of the base model.
      recipe: recipe of the run, of the class that the entry names.
      pool: pool of the modules that any seed draws; None for a method without one.
      modules: number of modules of a seed.
    """

    config: Architecture
    recipe: Any
    pool: Pool | None
    modules: int

    @property
    def sites(self) -> tuple[tuple[str, Site], ...]:
        """Linear maps that a method without a pool adapts."""
        return tuple(
            targeted(self.config, self.recipe.lora_targets, "lora_targets").items()
        )


class PlannedPool(NamedTuple):
    """The modules in a plan.

    Attributes:
      rank: rank of one module.
      pool: P, the number of modules in memory.
      targets: the linear maps that they adapt.
    """

    rank: int
    pool: int
    targets: tuple[str, ...] | None


class SearchJob(NamedTuple):
    """Arguments of a search.

    Attributes:
      problem: problem of all seeds.
      rows: rows to search on.
      recipe: recipe of the run, of the class that the entry names.
      seeds: seeds of the run.
      modules: names of the modules, by seed.
      record: function that takes rows for the run's metrics.
    """

    problem: Problem
    rows: TrainingRows
    recipe: Any
    seeds: tuple[int, ...]
    modules: tuple[tuple[str, ...], ...]
    record: Callable[[Iterable[Mapping[str, Any]]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """A method of the registry.

    Attributes:
      name: name, as in `lorafusion fuse --method NAME`.
      help: one line about it.
      build: function that returns the trained method.
      recipe: class of its recipe: the common fields and its own, which are the options of `lorafusion fuse --method
        NAME` and the fields of `recipe` in config.json.
      title: title in a table of counts, with fields of its recipe such as {lora_rank}; None for no row.
      basis_title: title of its row in a shared basis of {basis} directions; None for no row.
      pool: it fuses a pool.
      learns: `trained` by gradient steps, `searched` without gradients, `given` by the pool alone, or `untrained`.
      groups: groups of the parameters that it trains or searches, which are counted.
      answers: source of answers: the `model`, the model with `examples` in the prompt, or `nothing` but the training
        rows.
      seeded: seeds differ.
      check: raises ValueError, before anything is loaded, for a library that is not installed.
      search: for a method that is searched: function that returns its parameters and the number of steps of each seed.
      evaluations: number of times that a search passes the training rows, from the recipe and a seed's number of
        modules.
      cost_layouts: its layouts in hardware by their titles, from its recipe and the rank of a pool's modules; empty for
        no row.
    """

    name: str
    help: str
    build: Callable[[Built], Method]
    recipe: type[Recipe] = Recipe
    title: str | None = None
    basis_title: str | None = None
    pool: bool = False
    learns: Literal["trained", "searched", "given", "untrained"] = "trained"
    groups: tuple[str, ...] = ()
    answers: Literal["model", "examples", "nothing"] = "model"
    seeded: bool = True
    check: Callable[[], object] = lambda: None
    search: Callable[[SearchJob], tuple[Params, int]] | None = None
    evaluations: Callable[[Any, int], int] = lambda recipe, modules: 0
    cost_layouts: Callable[[Any, int], dict[str, CostLayout]] = lambda recipe, rank: {}


def module(rank: int) -> Callable[[Site], list[Matrix]]:
    """Return the A and B of one module at a site."""
    return lambda site: [(site.d_in, rank), (rank, site.d_out)]


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


def recipe_of(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """Return a recipe, or another dataclass, with its fields from values such as the `vars` of another recipe."""
    return kind(
        **{
            field.name: values[field.name]
            for field in dataclasses.fields(kind)  # pyright: ignore[reportArgumentType] (a dataclass)
            if field.name in values
        }
    )
