"""Matrix-vector products on tiled ReRAM crossbars: bit-sliced, exact, differentiable.

config = crossbar.load_config("isaac")
chip = crossbar.program(weights, config, key)     # write a matrix into arrays, once
y = crossbar.matmul(x, chip)                      # x @ weights, as the arrays compute it

Axis letters: B batch; N leading axes of a stack (L layers, or L layers and N modules), which a scan or `jax.vmap`
removes; K weight slices, J input slices, k conversions of a pair of slices (K, or 2 K where both polarities are
converted); P polarities (1 once subtracted), R row tiles (1 once summed), C column tiles; W words of slices.
"""

# ruff: noqa: F401

from types import ModuleType as _ModuleType

from .calibration.one_chip import Statistics, calibrated, probe, with_chosen_bits
from .calibration.restore import fit_corrections
from .calibration.whole_model import calibrate_tree, observe, site_errors
from .chip.chip import (
    Chip,
    Correction,
    Corrections,
    chips_in,
    is_chip,
    numbers_per_rank,
    programmed_weights,
    reads,
    with_chips,
    with_corrections,
    with_read_key,
    with_shared_factors,
)
from .chip.files import load_chip, save_chip
from .chip.plan import Plan
from .chip.program import is_random, program
from .chip.tree import Rules, program_tree
from .config.files import config_hash, load_config, save_config
from .config.grid import grid, parse_vary, usual_variations
from .config.presets import PRESETS
from .config.schema import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    Encoding,
    Mapping,
    Tile,
    deterministic,
)
from .config.structure import Structure, split_config
from .cost.energy import (
    CONSTANTS,
    Constants,
    Counts,
    ReadEnergy,
    WriteCost,
    conversion_energy,
    counts,
    load_constants,
    read_energy,
    read_latency,
    write_cost,
)
from .cost.explain import Explanation, explain
from .cost.ranges import Constant, Range
from .devices.device import Device, Readback, ReadNoise, Sinh, StuckAt
from .devices.drift import (
    PCM_DRIFT,
    RERAM_CMO_DRIFT,
    Flicker,
    LogLinear,
    PowerLaw,
    Relaxation,
    drift_compensation,
)
from .devices.wires import Wire
from .devices.write_error import (
    PCM_JOSHI_2020,
    RERAM_CMO_2025,
    RERAM_MILO_2021,
    RERAM_WAN_2022,
    Independent,
    Polynomial,
    Proportional,
    Table,
    WriteVerify,
)
from .exploration import (
    Choice,
    Cost,
    Exploration,
    Interval,
    Subject,
    interval,
)
from .mapping.adc.architectures import Architecture, register_adc
from .mapping.encoding import input_codes, pulses
from .mapping.geometry import Geometry
from .preparation.code_errors import CodeErrors, code_errors, unused_levels
from .preparation.moments import moments
from .preparation.preparation import Preparation, needs_preparation
from .preparation.prepare import expected_error, prepare
from .read.matmul import matmul

# The imports are the public names, so that a second list of them is not needed.
__all__ = sorted(  # pyright: ignore[reportUnsupportedDunderAll]
    name
    for name, value in globals().items()
    if not name.startswith("_") and not isinstance(value, _ModuleType)
)
