"""A run: its options, folder, set-up, evaluation and export."""

from .evaluate import evaluate as evaluate
from .evaluate import score_rows as score_rows
from .evaluate import seed_rows as seed_rows
from .export import ExportOptions as ExportOptions
from .export import export as export
from .folder import RunFolder as RunFolder
from .folder import RunResults as RunResults
from .folder import run_path as run_path
from .generation import SeedModels as SeedModels
from .generation import advance_rows as advance_rows
from .generation import begin_rows as begin_rows
from .generation import generate_rows as generate_rows
from .options import OnArrays as OnArrays
from .options import options_to_json as options_to_json
from .predict import EvaluateOptions as EvaluateOptions
from .predict import GenerateOptions as GenerateOptions
from .predict import evaluate_run as evaluate_run
from .predict import generate_lines as generate_lines
from .predict import load_to_evaluate as load_to_evaluate
from .predict import stream_lines as stream_lines
from .run import environment as environment
from .setup import Setup as Setup
from .setup import encode_shown as encode_shown
from .setup import load_setup as load_setup
from .setup import trainable_count as trainable_count
from .start import with_targets as with_targets
