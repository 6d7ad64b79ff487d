"""Runs on simulated chips: prepare a base, program, evaluate, restore."""

from .chip_file import Chips as Chips
from .chip_file import ProgramOptions as ProgramOptions
from .chip_file import aged as aged
from .chip_file import load_chips as load_chips
from .chip_file import write_chips as write_chips
from .chips import for_every_chip as for_every_chip
from .chips import on_every_chip as on_every_chip
from .chips import redrawn as redrawn
from .distil import distil as distil
from .distil import divergence as divergence
from .evaluate import EvaluateOnChipsOptions as EvaluateOnChipsOptions
from .evaluate import evaluate_on_chips as evaluate_on_chips
from .evaluate import lora_in_cells as lora_in_cells
from .evaluate import report_on_chips as report_on_chips
from .evaluate import results_path as results_path
from .on_arrays import module_numbers as module_numbers
from .on_arrays import without_merged_pool as without_merged_pool
from .prepare import PrepareOptions as PrepareOptions
from .prepare import prepare as prepare
from .program import Restored as Restored
from .program import program as _program
from .restore import RestoreOptions as RestoreOptions
from .restore import digital_matrices as digital_matrices
from .restore import drifting_otherwise as drifting_otherwise
from .restore import load_restored as load_restored
from .restore import restore_chips as restore_chips
from .texts import Outputs as Outputs
from .texts import logits_of_base as logits_of_base
from .texts import sampled as sampled
from .texts import windows as windows

program_on_arrays = _program
