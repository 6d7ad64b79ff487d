"""Training: steps, losses, seeds as an axis, meshes of devices."""

from ..support.platform import make_room as make_room
from .fit import Epoch as Epoch
from .fit import fit as fit
from .fit import recipe_rates as recipe_rates
from .fit import start as start
from .fit import train_seeds as train_seeds
from .loss import cross_entropy as cross_entropy
from .loss import log_likelihood as log_likelihood
from .loss import seed_entropies as seed_entropies
from .mesh import AXES as AXES
from .mesh import AXIS as AXIS
from .mesh import SeedMode as SeedMode
from .mesh import default_seed_mode as default_seed_mode
from .mesh import make_mesh as make_mesh
from .mesh import on_mesh as on_mesh
from .mesh import shardings as shardings
from .method import LOSS as LOSS
from .method import Params as Params
from .step import standard_promotion as standard_promotion
