"""The methods that are billed, from the registry, and the matrices of a base model in arrays."""

import dataclasses
from collections.abc import Callable

from ...methods import METHODS
from ...methods.method import Billed, Fused, Matrix, Placement, Update, module
from ...models.architecture import Architecture, Site
from ..parameters import trainable_count
from .options import CostOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Placement):
    """A method in one of its placements.

    Attributes:
      update: arithmetic of its update.
      trainable: number of trained numbers.
      searched: the method searches without gradients.
    """

    update: Update
    trainable: int
    searched: bool


def methods(config: Architecture, options: CostOptions, *, steps: int) -> dict[str, Method]:
    """Return every placement of every method by its title; LoRAFusion, which the others are compared with, comes last.

    Args:
      config: the base model.
      options: ranks, modules and targets.
      steps: number of training steps.

    Raises:
      ValueError: the model lacks one of the targets.
    """
    recipe, modules = options.recipe, Fused(options.rank, options.modules, options.targets)
    base = sum(d_in * d_out * layers for (d_in, d_out), layers in base_matrices(config))
    found = {}
    for entry in sorted(METHODS.values(), key=lambda entry: entry.name == "fusion"):
        counts = trainable_count(entry, config, recipe, modules)
        of_method = {
            "update": entry.update(recipe, modules),
            "trainable": sum(counts.values()),
            "searched": entry.learns == "searched",
        }
        for title, placement in entry.placements(Billed(recipe, options.rank, counts, steps, base)).items():
            found[title] = Method(**vars(placement), **of_method)
    return found


def side_by_side(modules: int, rank: int) -> Callable[[Site], list[Matrix]]:
    """Return the modules' A next to each other along columns, and their B along rows, so that their outputs add up."""
    return module(modules * rank)


def base_matrices(config: Architecture) -> list[tuple[Matrix, int]]:
    """Return the matrices in arrays, and how often each shape occurs."""
    found = [((site.d_in, site.d_out), site.layers) for site in config.sites.values()]
    return found if config.tied else [*found, (config.head, 1)]
