"""The methods whose costs are computed, from the registry, and the matrices of a base model in arrays."""

import dataclasses

from ...methods import METHODS
from ...methods.entry import (
    Billed,
    CostLayout,
    Matrix,
    MethodEntry,
    PlannedPool,
    Update,
)
from ...methods.recipes import recipe_of
from ...models.architecture import Architecture, targeted
from ..params import trainable_count
from .options import CostOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class BilledMethod(CostLayout):
    """A method in one of its layouts."""

    update: Update  # arithmetic of its update
    trainable: int
    evaluations: int  # number of times that a search without gradients passes the training rows; 0 if the method trains
    # the method with all modules of the pool, in one backward pass that ranks them; None without such a pass
    ranking: "BilledMethod | None" = None


def methods(
    config: Architecture, options: CostOptions, *, steps: int
) -> dict[str, BilledMethod]:
    """Return every layout of every method by its title; LoRAFusion, which the others are compared with, comes last."""
    modules = PlannedPool(options.rank, options.modules, options.targets)
    base = sum(d_in * d_out * layers for (d_in, d_out), layers in base_matrices(config))
    adapted = sum(site.layers for site in targeted(config, options.targets).values())
    in_bases = [{"basis": k} for k in options.bases]
    by_title = {}
    for entry in sorted(METHODS.values(), key=lambda entry: entry.name == "fusion"):
        for more in ({}, *(in_bases if entry.basis_title is not None else ())):
            recipe = recipe_of(entry.recipe, options.numbers | more)
            counts = trainable_count(entry, config, recipe, modules)
            billed = Billed(recipe, options.rank, counts, steps, base, adapted)
            for title, layout in entry.cost_layouts(billed).items():
                by_title[title] = BilledMethod(
                    **vars(layout),
                    update=_placed(entry.update(recipe, modules), layout),
                    trainable=sum(counts.values()),
                    evaluations=entry.evaluations(recipe, options.modules)
                    if entry.learns == "searched"
                    else 0,
                    ranking=_ranking(entry, title, billed, options),
                )
    return by_title


def _ranking(
    entry: MethodEntry, title: str, billed: Billed, options: CostOptions
) -> BilledMethod | None:
    """Return the pass over whole modules that ranks a pool; it is digital where the arrays hold a basis alone."""
    if options.stored == options.modules or not entry.pool or entry.learns != "trained":
        return None
    recipe = recipe_of(entry.recipe, options.numbers | {"modules": options.stored})
    layout = entry.cost_layouts(billed._replace(recipe=recipe)).get(
        title, CostLayout(installed_words=0)
    )
    update = entry.update(
        recipe, PlannedPool(options.rank, options.stored, options.targets)
    )
    return BilledMethod(
        **vars(layout), update=_placed(update, layout), trainable=0, evaluations=0
    )


def _placed(update: Update, layout: CostLayout) -> Update:
    return dataclasses.replace(update, in_arrays=layout.trains_in == "arrays")


def base_matrices(config: Architecture) -> list[tuple[Matrix, int]]:
    """Return the matrices in arrays, and how often each shape occurs."""
    matrices = [
        ((site.d_in, site.d_out), site.layers) for site in config.sites.values()
    ]
    return matrices if config.tied else [*matrices, (config.head, 1)]
