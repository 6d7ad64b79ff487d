"""The public names of the package."""

from . import crossbar
from ._fuse import fuse
from .adapters.basis import SharedBasis, shared_basis
from .adapters.composition import compose
from .adapters.norms import Gram, column_norms, gram
from .adapters.pool import LoraPool, random_pool, shuffled_pool
from .adapters.updates import LowRank, Modules
from .crossbar import Chip, CrossbarConfig, program, program_tree, with_read_key
from .files import FileError
from .io.export import merged_base
from .io.hf import base_tensor, load_base, load_tokenizer, read_config, save_base
from .io.pool import load_basis, load_pool, read_pool
from .methods import METHODS, register
from .methods.fusion import Fusion
from .methods.lora import LoRA
from .methods.merge import Merge
from .methods.method import MethodEntry, Update
from .methods.untrained import ZeroShot
from .models.architecture import Architecture, Site, kernels, places
from .models.generate import Sampling, generate
from .models.weights import matmul, quantise
from .runs.options import FuseOptions
from .runs.run import load_run
from .serving.bank import TaskBank
from .serving.service import FusedRun, Service
from .tasks import Batch
from .training.loss import objective
from .training.problem import Frozen, Method, Problem
from .training.recipe import PRESETS, Optimisation, Rates, Recipe
from .training.seeds import over_seeds
from .training.step import TrainState, fusion_step, init_state

__all__ = [
    "METHODS",
    "PRESETS",
    "Architecture",
    "Batch",
    "Chip",
    "CrossbarConfig",
    "FileError",
    "Frozen",
    "FuseOptions",
    "FusedRun",
    "Fusion",
    "Gram",
    "LoRA",
    "LoraPool",
    "LowRank",
    "Merge",
    "Method",
    "MethodEntry",
    "Modules",
    "Optimisation",
    "Problem",
    "Rates",
    "Recipe",
    "Sampling",
    "Service",
    "SharedBasis",
    "Site",
    "TaskBank",
    "TrainState",
    "Update",
    "ZeroShot",
    "base_tensor",
    "column_norms",
    "compose",
    "crossbar",
    "fuse",
    "fusion_step",
    "generate",
    "gram",
    "init_state",
    "kernels",
    "load_base",
    "load_basis",
    "load_pool",
    "load_run",
    "load_tokenizer",
    "matmul",
    "merged_base",
    "objective",
    "over_seeds",
    "places",
    "program",
    "program_tree",
    "quantise",
    "random_pool",
    "read_config",
    "read_pool",
    "register",
    "save_base",
    "shared_basis",
    "shuffled_pool",
    "with_read_key",
]
