"""The public names of the package."""

from . import crossbar
from ._fuse import fuse
from .adapters.basis import SharedBasis, shared_basis
from .adapters.composition import compose
from .adapters.norms import Gram, column_norms, gram
from .adapters.pool import LoraPool, random_pool, shuffled_pool
from .adapters.updates import LowRank, Modules, Rescaled
from .crossbar import Chip, CrossbarConfig, program, program_tree, with_read_key
from .files import FileError
from .io.export import merged_base
from .io.hf import base_tensor, load_base, load_tokenizer, read_config, save_base
from .io.pool import load_basis, load_pool, read_pool
from .methods import METHODS, register
from .methods.cma import CMARecipe
from .methods.entry import CostLayout, MethodEntry, Update
from .methods.full import FullRecipe
from .methods.fusion import PRESETS, CoefficientsRecipe, Fusion, FusionRecipe
from .methods.lora import DoRARecipe, LoRA, LoRARecipe
from .methods.lorahub import LoraHubRecipe
from .methods.magnitudes import MagnitudesRecipe
from .methods.merge import Merge, MergeRecipe
from .methods.recipes import BasisRecipe, PoolRecipe, TargetedRecipe
from .methods.untrained import FewShotRecipe, ZeroShot
from .methods.vera import VeRARecipe
from .models.architecture import Architecture, Site, kernels, places
from .models.generate import Sampling, generate
from .models.weights import matmul, quantise
from .runs.options import FuseOptions
from .runs.run import load_run
from .serving.bank import TaskBank
from .serving.service import FusedRun, Service
from .tasks import Batch
from .training.frozen import Frozen
from .training.loss import objective
from .training.method import Method
from .training.problem import Problem
from .training.recipe import Optimisation, Rates, Recipe
from .training.seeds import over_seeds
from .training.step import TrainState, fusion_step, init_state

__all__ = [
    "METHODS",
    "PRESETS",
    "Architecture",
    "BasisRecipe",
    "Batch",
    "CMARecipe",
    "Chip",
    "CoefficientsRecipe",
    "CostLayout",
    "CrossbarConfig",
    "DoRARecipe",
    "FewShotRecipe",
    "FileError",
    "Frozen",
    "FullRecipe",
    "FuseOptions",
    "FusedRun",
    "Fusion",
    "FusionRecipe",
    "Gram",
    "LoRA",
    "LoRARecipe",
    "LoraHubRecipe",
    "LoraPool",
    "LowRank",
    "MagnitudesRecipe",
    "Merge",
    "MergeRecipe",
    "Method",
    "MethodEntry",
    "Modules",
    "Optimisation",
    "PoolRecipe",
    "Problem",
    "Rates",
    "Recipe",
    "Rescaled",
    "Sampling",
    "Service",
    "SharedBasis",
    "Site",
    "TargetedRecipe",
    "TaskBank",
    "TrainState",
    "Update",
    "VeRARecipe",
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
