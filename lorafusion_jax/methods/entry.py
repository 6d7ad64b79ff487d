"""Entries of the registry of methods, with the data for runs, counts, plans and costs.

Letters: N modules of a fusion, P modules in memory, r rank, k directions of a basis.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..adapters.basis import Pool
from ..models.architecture import Architecture, Site, targeted
from ..tasks import TrainingRows
from ..training.method import Method, Params
from ..training.problem import Problem
from ..training.recipe import Recipe

Matrix = tuple[int, int]
Storage = Literal["arrays", "memory"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """The arithmetic of a method at every adapted matrix, which FLOPs, bytes and energy are counted from.

    This class itself has no matrix products, like a scale of the columns. A method with products has a subclass.

    Attributes:
      targets: the linear maps that are adapted, wherever they occur; None for the family's own choice.
      in_arrays: the method's frozen matrices stay in arrays while it is trained.
      trains_base: every weight of the base model is trained, and there are no adapters.
    """

    targets: tuple[str, ...] | None = None
    in_arrays: bool = False
    trains_base: bool = False

    def width(self, site: Site, tokens: int) -> int:
        """Return the number of values per token, of so many, between the update's two products; 0 if it has none."""
        return 0

    def core(self, site: Site) -> int:
        """Return the multiply-adds of a token between the two products."""
        return 0

    def once(self, site: Site) -> int:
        """Return the FLOPs of one matrix before any token: fused factors, and the norms of its columns."""
        return 0

    def repeat(self, site: Site) -> int:
        """Return the FLOPs of `once` that the model repeats for every generated token."""
        return 0

    def gradients(self, site: Site, tokens: int) -> int:
        """Return the FLOPs of the gradients of one matrix' trained parameters, given the gradients of its outputs."""
        return 0

    def frozen_width(self) -> int:
        """Return the columns of A (and rows of B) of all frozen modules at a matrix, which may be held in few bits."""
        return 0

    def frozen_numbers(self, sites: Sequence[Site]) -> int:
        """Return the count of other numbers that stay in memory for all adapted matrices, such as terms of norms."""
        return 0

    def working_numbers(self, sites: Sequence[Site]) -> int:
        """Return the count of numbers of modules and fused factors that a pass holds at once."""
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostLayout:
    """Places of a method's adapters, and the digital work of a token.

    Attributes:
      installed_words: words that are written to memory, or read there, to install the finished task.
      installed_macs: digital multiply-adds of the installation.
      matrices: function from a site to the matrices of its adapter, A before B.
      macs: digital multiply-adds of a token at a site, at inference.
      words: words read from memory for a token.
      tables: words of precomputed terms at a site, kept for all tasks, that every pass of training reads.
      trains_in: where the adapters are while they are trained.
      stays_in: where they are afterwards.
      passes: number of times that the cells are written for the task.
      shared: all sites read the same matrices.
    """

    installed_words: int
    installed_macs: int = 0
    matrices: Callable[[Site], list[Matrix]] = lambda site: []
    macs: Callable[[Site], int] = lambda site: 0
    words: Callable[[Site], int] = lambda site: 0
    tables: Callable[[Site], int] = lambda site: 0
    trains_in: Storage = "memory"
    stays_in: Storage = "memory"
    passes: int = 0
    shared: bool = False


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
      accelerator: the plan is for an accelerator.
      forms: norms form sums as matrices, and products may use these: in float32 on a CPU.
    """

    rank: int
    pool: int
    targets: tuple[str, ...] | None
    accelerator: bool = False
    forms: bool = False


class Billed(NamedTuple):
    """Numbers that a cost is computed from.

    Attributes:
      recipe: recipe of the task, of the class that the entry names.
      rank: rank of one module.
      counts: number of parameters that the method trains, by group.
      steps: number of training steps.
      base: number of the base model's numbers in arrays.
      adapted: number of matrices that the modules adapt.
    """

    recipe: Any
    rank: int
    counts: Mapping[str, int]
    steps: int
    base: int
    adapted: int


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
      recipe: class of its recipe: the common numbers and its own, which are the options of `lorafusion fuse --method
        NAME` and the fields of `recipe` in config.json.
      update: its arithmetic, for FLOPs and bytes, from the recipe and the modules.
      title: title in a table of counts, with numbers of its recipe such as {lora_rank}; None for no row.
      basis_title: title of its row in a shared basis of {basis} directions; None for no row.
      pool: it fuses a pool.
      learns: `trained` by gradient steps, `searched` without gradients, `given` by the pool alone, or `untrained`.
      groups: groups of the parameters that it trains or searches, which are counted.
      answers: source of answers: the `model`, the model with `examples` in the prompt, or `nothing` but the training
        rows.
      seeded: seeds differ.
      check: raises ValueError, before anything is loaded, for a library that is not installed.
      search: for a method that is searched: function that returns its numbers and the number of steps of each seed.
      evaluations: number of times that a search passes the training rows, from the recipe and a seed's number of
        modules.
      cost_layouts: its layouts in hardware, by a title for its costs; empty if it has none.
    """

    name: str
    help: str
    build: Callable[[Built], Method]
    update: Callable[[Any, PlannedPool], Update]
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
    cost_layouts: Callable[[Billed], dict[str, CostLayout]] = lambda billed: {}


def module(rank: int) -> Callable[[Site], list[Matrix]]:
    """Return the A and B of one module at a site."""
    return lambda site: [(site.d_in, rank), (rank, site.d_out)]
