"""The public names of the package: each import is one of them."""

from . import crossbar as crossbar
from .adapters.basis import SharedBasis as SharedBasis, shared_basis as shared_basis
from .adapters.composition import compose as compose
from .adapters.norms import Gram as Gram, column_norms as column_norms, gram as gram
from .adapters.pool import (
    LoraPool as LoraPool,
    random_pool as random_pool,
    rotated_pool as rotated_pool,
    shuffled_pool as shuffled_pool,
)
from .adapters.updates import (
    LowRank as LowRank,
    Modules as Modules,
    Rescaled as Rescaled,
    WeightDecomposed as WeightDecomposed,
)
from .crossbar import (
    Chip as Chip,
    CrossbarConfig as CrossbarConfig,
    program as program,
    program_tree as program_tree,
    with_read_key as with_read_key,
)
from .hardware.distil import Restoring as Restoring, restore as restore
from .hardware.on_arrays import fuse as fuse
from .io.export import merged_base as merged_base
from .io.hf import (
    base_tensor as base_tensor,
    load_base as load_base,
    load_tokenizer as load_tokenizer,
    read_config as read_config,
    save_base as save_base,
)
from .io.pool import (
    load_basis as load_basis,
    load_pool as load_pool,
    read_pool as read_pool,
)
from .loading.spec import LoadOptions as LoadOptions
from .methods import METHODS as METHODS, register as register
from .methods.base_alone import (
    FewShotRecipe as FewShotRecipe,
    FullRecipe as FullRecipe,
    MagnitudesRecipe as MagnitudesRecipe,
    ZeroShot as ZeroShot,
)
from .methods.entry import (
    BasisRecipe as BasisRecipe,
    Built as Built,
    CostLayout as CostLayout,
    MethodEntry as MethodEntry,
    PoolRecipe as PoolRecipe,
    TargetedRecipe as TargetedRecipe,
)
from .methods.fusion import (
    PRESETS as PRESETS,
    CoefficientsRecipe as CoefficientsRecipe,
    Fusion as Fusion,
    FusionRecipe as FusionRecipe,
)
from .methods.lora import (
    DoRARecipe as DoRARecipe,
    LoRA as LoRA,
    LoRARecipe as LoRARecipe,
)
from .methods.lorahub import LoraHubRecipe as LoraHubRecipe
from .methods.merge import Merge as Merge, MergeRecipe as MergeRecipe
from .methods.vera import VeRARecipe as VeRARecipe
from .models.architecture import (
    Architecture as Architecture,
    Site as Site,
    kernels as kernels,
    places as places,
)
from .models.generate import Sampling as Sampling, generate as generate
from .models.weights import matmul as matmul, quantise as quantise
from .runs.folder import load_run as load_run
from .runs.options import FuseOptions as FuseOptions
from .serving.bank import TaskBank as TaskBank
from .serving.service import FusedRun as FusedRun, Service as Service
from .support.reading import FileError as FileError
from .tasks import Batch as Batch
from .training.loss import objective as objective
from .training.mesh import over_seeds as over_seeds
from .training.method import Frozen as Frozen, Method as Method
from .training.problem import Problem as Problem, problem as problem
from .training.recipe import Optimisation as Optimisation, Recipe as Recipe
from .training.step import (
    TrainState as TrainState,
    fusion_step as fusion_step,
    init_state as init_state,
)
