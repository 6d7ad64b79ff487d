"""Training: steps, losses, seeds as an axis, meshes of devices."""

from ..support.platform import make_room as make_room
from .fit import (
    Epoch as Epoch,
    fit as fit,
    recipe_rates as recipe_rates,
    start as start,
    train_seeds as train_seeds,
)
from .loss import (
    cross_entropy as cross_entropy,
    log_likelihood as log_likelihood,
    seed_entropies as seed_entropies,
)
from .mesh import (
    AXES as AXES,
    AXIS as AXIS,
    SeedMode as SeedMode,
    default_seed_mode as default_seed_mode,
    make_mesh as make_mesh,
    on_mesh as on_mesh,
    shardings as shardings,
)
from .method import LOSS as LOSS, Params as Params
from .step import standard_promotion as standard_promotion
