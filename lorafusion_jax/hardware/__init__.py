"""Runs on simulated chips: prepare a base, program, evaluate, restore."""

from .chip_file import (
    Chips as Chips,
    ProgramOptions as ProgramOptions,
    aged as aged,
    load_chips as load_chips,
    write_chips as write_chips,
)
from .chips import (
    for_every_chip as for_every_chip,
    on_every_chip as on_every_chip,
    redrawn as redrawn,
)
from .distil import divergence as divergence
from .evaluate import (
    EvaluateOnChipsOptions as EvaluateOnChipsOptions,
    evaluate_on_chips as evaluate_on_chips,
    report_on_chips as report_on_chips,
    results_path as results_path,
)
from .explore import (
    ExploreOptions as ExploreOptions,
    explore as explore,
    save_best as save_best,
)
from .on_arrays import module_numbers as module_numbers
from .prepare import PrepareOptions as PrepareOptions, prepare as prepare
from .program import program as _program
from .restore import (
    RestoreOptions as RestoreOptions,
    digital_matrices as digital_matrices,
    load_restored as load_restored,
    restore_chips as restore_chips,
)
from .texts import (
    Outputs as Outputs,
    logits_of_base as logits_of_base,
    sampled as sampled,
    windows as windows,
)

program_on_arrays = _program
