"""The methods that are billed, from the registry, and the matrices of a base model in arrays."""

import dataclasses

from ...methods import METHODS
from ...methods.method import Billed, Fused, Matrix, MethodEntry, Placement, Update
from ...models.architecture import Architecture, targeted
from ..parameters import trainable_count
from .options import CostOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Placement):
    """A method in one of its placements.

    Attributes:
      update: arithmetic of its update.
      trainable: number of trained numbers.
      searched: the method searches without gradients.
      ranking: the method with all modules of the pool, in one backward pass that ranks them; None without such a pass.
    """

    update: Update
    trainable: int
    searched: bool
    ranking: "Method | None" = None


def methods(config: Architecture, options: CostOptions, *, steps: int) -> dict[str, Method]:
    """Return every placement of every method by its title; LoRAFusion, which the others are compared with, comes last.

    Args:
      config: the base model.
      options: ranks, modules and targets.
      steps: number of training steps.

    Raises:
      ValueError: the model lacks one of the targets.
    """
    modules = Fused(options.rank, options.modules, options.targets)
    base = sum(d_in * d_out * layers for (d_in, d_out), layers in base_matrices(config))
    adapted = sum(site.layers for site in targeted(config, options.targets).values())
    cores = (False, True) if options.core else (False,)
    in_bases = [dataclasses.replace(options.recipe, basis=k, core=core) for k in options.bases for core in cores]
    found = {}
    for entry in sorted(METHODS.values(), key=lambda entry: entry.name == "fusion"):
        for recipe in (options.recipe, *(in_bases if entry.basis_title is not None else ())):
            counts = trainable_count(entry, config, recipe, modules)
            billed = Billed(recipe, options.rank, counts, steps, base, adapted)
            for title, placement in entry.placements(billed).items():
                found[title] = Method(
                    **vars(placement),
                    update=_placed(entry.update(recipe, modules), placement),
                    trainable=sum(counts.values()),
                    searched=entry.learns == "searched",
                    ranking=_ranking(entry, title, billed, options),
                )
    return found


def _ranking(entry: MethodEntry, title: str, billed: Billed, options: CostOptions) -> Method | None:
    """Return the pass over whole modules that ranks a pool; it is digital where the arrays hold a basis alone."""
    if options.stored == options.modules or not entry.pool or entry.learns != "trained":
        return None
    recipe = dataclasses.replace(options.recipe, modules=options.stored)
    placement = entry.placements(billed._replace(recipe=recipe)).get(title, Placement(installed_words=0))
    update = entry.update(recipe, Fused(options.rank, options.stored, options.targets))
    return Method(**vars(placement), update=_placed(update, placement), trainable=0, searched=False)


def _placed(update: Update, placement: Placement) -> Update:
    return dataclasses.replace(update, in_arrays=placement.trains_in == "arrays")


def base_matrices(config: Architecture) -> list[tuple[Matrix, int]]:
    """Return the matrices in arrays, and how often each shape occurs."""
    found = [((site.d_in, site.d_out), site.layers) for site in config.sites.values()]
    return found if config.tied else [*found, (config.head, 1)]
