"""Public names below whole runs, for experiments and benchmarks of one's own; minor versions may change them.

The parts of a run: load a model, set up a task, train, evaluate, put weights on chips, estimate, write files.
`lorafusion_jax` has the stable names, and `tasks`, `methods`, `report` and `crossbar` their own.
"""

# Coefficients of modules, and merges.
from .adapters.coefficients import column_names as column_names
from .adapters.coefficients import expand as expand
from .adapters.merges import MergeKind as MergeKind

# Codes of crossbars.
from .crossbar.mapping.encoding import input_codes as input_codes
from .crossbar.mapping.encoding import pulses as pulses

# Estimates: energy, FLOPs, memory, plans.
from .estimates.bill import Bill as Bill
from .estimates.bill import CostOptions as CostOptions
from .estimates.bill import activities as activities
from .estimates.bill import bills as bills
from .estimates.bill import comparisons as comparisons
from .estimates.bill import installed_once as installed_once
from .estimates.bill import price as price
from .estimates.bill import price_once as price_once
from .estimates.bill.show import number as number
from .estimates.bill.show import quantity as quantity
from .estimates.estimate import Settings as Settings
from .estimates.estimate import trained_numbers as trained_numbers
from .estimates.estimate import update_of as update_of
from .estimates.flops import Shape as Shape
from .estimates.flops import generation_flops as generation_flops
from .estimates.flops import row_tokens as row_tokens
from .estimates.flops import step_flops as step_flops
from .estimates.flops import tokens as tokens
from .estimates.machines import PlanOptions as PlanOptions
from .estimates.machines import machine as machine
from .estimates.memory import evaluation_bytes as evaluation_bytes
from .estimates.memory import pool_bytes as pool_bytes
from .estimates.memory import state_bytes as state_bytes
from .estimates.memory import step_bytes as step_bytes
from .estimates.memory import weights_bytes as weights_bytes
from .estimates.params import shape_config as shape_config
from .estimates.plan import describe as describe
from .estimates.plan import describe_run as describe_run
from .estimates.plan import plan as plan
from .estimates.workload import CHARACTERS_PER_TOKEN as CHARACTERS_PER_TOKEN
from .estimates.workload import workload as workload

# Chips: program, evaluate, correct.
from .hardware.chips import for_every_chip as for_every_chip
from .hardware.chips import on_every_chip as on_every_chip
from .hardware.chips import redrawn as redrawn
from .hardware.evaluate import EvaluateOnChipsOptions as EvaluateOnChipsOptions
from .hardware.evaluate import evaluate_on_chips as evaluate_on_chips
from .hardware.evaluate import lora_in_cells as lora_in_cells
from .hardware.evaluate import results_path as results_path
from .hardware.folder import Chips as Chips
from .hardware.folder import aged as aged
from .hardware.folder import load_chips as load_chips
from .hardware.on_arrays import module_numbers as module_numbers
from .hardware.on_arrays import without_merged_pool as without_merged_pool
from .hardware.program import Restored as Restored
from .hardware.program import program as _program_on_arrays
from .hardware.report import report_on_chips as report_on_chips
from .hardware.restore import distil as distil
from .hardware.restore import divergence as divergence
from .hardware.restored import RestoreOptions as RestoreOptions
from .hardware.restored import digital_matrices as digital_matrices
from .hardware.restored import drifting_otherwise as drifting_otherwise
from .hardware.restored import load_restored as load_restored
from .hardware.restored import restore_chips as restore_chips
from .hardware.texts import Outputs as Outputs
from .hardware.texts import logits_of_base as logits_of_base
from .hardware.texts import sampled as sampled
from .hardware.texts import windows as windows
from .hardware.write import ProgramOptions as ProgramOptions
from .hardware.write import write_chips as write_chips

# Files: adapters, pools, base models, arrays.
from .io.arrays import load as _load_arrays
from .io.arrays import save as _save_arrays
from .io.convert import ConvertOptions as ConvertOptions
from .io.convert import add_basis as add_basis
from .io.convert import convert as convert
from .io.export import fused_adapter as fused_adapter
from .io.export import lora_adapter as lora_adapter
from .io.folders import new_folder as new_folder
from .io.hf import open_base as open_base
from .io.peft.adapter import AdapterError as AdapterError
from .io.peft.adapter import read_adapter as read_adapter
from .io.peft.adapter import resave as resave
from .io.peft.adapter import write_adapter as write_adapter
from .io.pool import ConvertedPool as ConvertedPool
from .io.pool import open_pool as open_pool

# Load a model.
from .loading.model import LoadedModel as LoadedModel
from .loading.model import Texts as Texts
from .loading.model import load_model as load_model
from .loading.model import load_texts as load_texts
from .loading.model import packing_of as packing_of
from .loading.model import pays_unrolled as pays_unrolled
from .loading.spec import LoadIn as LoadIn

# Methods.
from .methods.full import FullFineTuning as FullFineTuning
from .methods.fused import MixUpdate as MixUpdate
from .methods.fused import SumUpdate as SumUpdate
from .methods.magnitudes import Magnitudes as Magnitudes
from .methods.mean import MeanFusion as MeanFusion
from .methods.vera import VeRA as VeRA

# Models, their matrices and generation.
from .models.architecture import Model as Model
from .models.architecture import linear_shapes as linear_shapes
from .models.architecture import matrices as matrices
from .models.architecture import set_matrices as set_matrices
from .models.architecture import stack_of as stack_of
from .models.architecture import step_operations as step_operations
from .models.architecture import targeted as targeted
from .models.decoder import Decoder as Decoder
from .models.decoder import DecoderConfig as DecoderConfig
from .models.generate import GREEDY as GREEDY
from .models.generate import advance as advance
from .models.generate import begin as begin
from .models.registry import abstract_model as abstract_model
from .models.registry import family_of as family_of
from .models.registry import known_shapes as known_shapes
from .models.t5 import T5 as T5
from .models.t5 import T5Config as T5Config
from .models.t5.model import decoder_inputs as decoder_inputs
from .models.weights import Unstacked as Unstacked
from .models.weights import dense as dense

# Runs: set up, evaluate, export.
from .runs.evaluate import evaluate as evaluate
from .runs.evaluate import seed_rows as seed_rows
from .runs.export import ExportOptions as ExportOptions
from .runs.export import export as export
from .runs.folder import RunFolder as RunFolder
from .runs.options import OnArrays as OnArrays
from .runs.predict import EvaluateOptions as EvaluateOptions
from .runs.predict import GenerateOptions as GenerateOptions
from .runs.predict import evaluate_run as evaluate_run
from .runs.predict import generate_lines as generate_lines
from .runs.predict import load_to_evaluate as load_to_evaluate
from .runs.predict import stream_lines as stream_lines
from .runs.rows import SeedModels as SeedModels
from .runs.rows import advance_rows as advance_rows
from .runs.rows import begin_rows as begin_rows
from .runs.rows import generate_rows as generate_rows
from .runs.run import environment as environment
from .runs.run import options_to_json as options_to_json
from .runs.run import run_path as run_path
from .runs.run import with_targets as with_targets
from .runs.setup import Setup as Setup
from .runs.setup import encode_shown as encode_shown
from .runs.setup import load_setup as load_setup
from .runs.setup import trainable_count as trainable_count

# Numbers, tables and files.
from .support.checks import at_least as at_least
from .support.platform import for_cpu as for_cpu
from .support.progress import progress as progress
from .support.reading import read_json as read_json
from .support.reading import structured as structured
from .support.text import printable as printable
from .support.text_tables import escaped as escaped
from .support.text_tables import markdown as markdown
from .support.writing import write as write
from .support.writing import writing as writing

# Training: steps, losses, meshes, seeds.
from .training.compiled import make_room as make_room
from .training.fit import Epoch as Epoch
from .training.fit import fit as fit
from .training.fit import recipe_rates as recipe_rates
from .training.fit import start as start
from .training.fit import train_seeds as train_seeds
from .training.frozen import LOSS as LOSS
from .training.loss import cross_entropy as cross_entropy
from .training.loss import log_likelihood as log_likelihood
from .training.loss import seed_entropies as seed_entropies
from .training.loss import seed_likelihoods as seed_likelihoods
from .training.mesh import AXES as AXES
from .training.mesh import make_mesh as make_mesh
from .training.mesh import on_mesh as on_mesh
from .training.mesh import shardings as shardings
from .training.method import Params as Params
from .training.seeds import AXIS as AXIS
from .training.seeds import SeedMode as SeedMode
from .training.seeds import default_seed_mode as default_seed_mode
from .training.step import standard_promotion as standard_promotion

program_on_arrays = _program_on_arrays
load_arrays = _load_arrays
save_arrays = _save_arrays
