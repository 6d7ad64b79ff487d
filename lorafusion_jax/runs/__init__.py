"""A run: its options, folder, set-up, evaluation and export."""

from .evaluate import (
    evaluate as evaluate,
    score_rows as score_rows,
    seed_rows as seed_rows,
)
from .export import ExportOptions as ExportOptions, export as export
from .folder import (
    RunFolder as RunFolder,
    RunResults as RunResults,
    run_path as run_path,
)
from .generation import (
    SeedModels as SeedModels,
    advance_rows as advance_rows,
    begin_rows as begin_rows,
    generate_rows as generate_rows,
)
from .options import OnArrays as OnArrays, options_to_json as options_to_json
from .predict import (
    EvaluateOptions as EvaluateOptions,
    GenerateOptions as GenerateOptions,
    evaluate_run as evaluate_run,
    generate_lines as generate_lines,
    load_to_evaluate as load_to_evaluate,
    stream_lines as stream_lines,
)
from .run import environment as environment
from .setup import (
    Setup as Setup,
    encode_shown as encode_shown,
    load_setup as load_setup,
    trainable_count as trainable_count,
)
from .start import with_targets as with_targets
