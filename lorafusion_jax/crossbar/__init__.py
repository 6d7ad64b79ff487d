"""Matrix-vector products on tiled ReRAM crossbars: bit-sliced, exact, differentiable.

config = crossbar.load_config("isaac")
state = crossbar.program(weights, config, key)     # write a matrix into arrays, once
y = crossbar.mvm(x, state, config)                 # what the arrays make of x @ weights
"""

from .calibration.one_chip import Statistics, calibrated, probe
from .calibration.whole_model import calibrate_tree, observe, site_errors
from .chip.files import load_state, save_state
from .chip.plan import Plan
from .chip.program import ArrayState, program, programmed_weights
from .chip.segments import Segments, map_layers, scan_layers
from .chip.tree import program_tree
from .chip.weight import Programmed, reads
from .config.files import config_hash, load_config, save_config
from .config.presets import PRESETS
from .config.schema import ADC, DAC, Cell, CrossbarConfig, Encoding, Mapping, Tile
from .cost.constants import CONSTANTS, Constant, Constants, load_constants, save_constants
from .cost.counts import Counts, counts
from .cost.energy import ReadEnergy, WriteCost, read_energy, read_latency, write_cost
from .cost.explain import Explanation, explain
from .cost.ranges import Range
from .devices.device import Device, ReadNoise, Sinh, StuckAt
from .devices.drift import PCM_DRIFT, RERAM_CMO_DRIFT, Flicker, LogLinear, PowerLaw, Relaxation, drift_compensation
from .devices.wires import Wire
from .devices.write_error import (
    PCM_JOSHI_2020,
    RERAM_CMO_2025,
    RERAM_MILO_2021,
    RERAM_WAN_2022,
    Independent,
    Polynomial,
    Proportional,
    WriteVerify,
)
from .read.matmul import mvm

__all__ = [
    "ADC",
    "CONSTANTS",
    "DAC",
    "PCM_DRIFT",
    "PCM_JOSHI_2020",
    "PRESETS",
    "RERAM_CMO_2025",
    "RERAM_CMO_DRIFT",
    "RERAM_MILO_2021",
    "RERAM_WAN_2022",
    "ArrayState",
    "Cell",
    "Constant",
    "Constants",
    "Counts",
    "CrossbarConfig",
    "Device",
    "Encoding",
    "Explanation",
    "Flicker",
    "Independent",
    "LogLinear",
    "Mapping",
    "Plan",
    "Polynomial",
    "PowerLaw",
    "Programmed",
    "Proportional",
    "Range",
    "ReadEnergy",
    "ReadNoise",
    "Relaxation",
    "Segments",
    "Sinh",
    "Statistics",
    "StuckAt",
    "Tile",
    "Wire",
    "WriteCost",
    "WriteVerify",
    "calibrate_tree",
    "calibrated",
    "config_hash",
    "counts",
    "drift_compensation",
    "explain",
    "load_config",
    "load_constants",
    "load_state",
    "map_layers",
    "mvm",
    "observe",
    "probe",
    "program",
    "program_tree",
    "programmed_weights",
    "read_energy",
    "read_latency",
    "reads",
    "save_config",
    "save_constants",
    "save_state",
    "scan_layers",
    "site_errors",
    "write_cost",
]
