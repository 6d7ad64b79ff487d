"""Crossbars of the literature, with the source of each number and a note on parts that are not modelled.

[S] was read in the named source, [R] is recalled from the paper. Inputs are sign and magnitude everywhere, and full
scale is each input vector's largest |x|. An array holds one weight slice.
"""

from types import MappingProxyType

from ..devices.device import Device
from ..devices.drift import PCM_DRIFT
from ..devices.write_error import PCM_JOSHI_2020, RERAM_WAN_2022
from .schema import ADC, DAC, Cell, CrossbarConfig, Encoding, Mapping, Tile

# Real-valued weights in perfect cells, no converters: `x @ W`.
_ideal = CrossbarConfig(
    cell=Cell(bits=None), mapping=Mapping(weight_bits=None), dac=None
)

# Shafiee et al., ISCA 2016. 128 x 128 arrays, 16-bit weights in eight 2-bit cells, 16-bit inputs bit by bit, offset
# encoding with a unit column, 2 kOhm to 2 MOhm, one ADC step per level: CrossSim's configs/ISAAC.json [S]. Flipped
# columns and the 8-bit ADC that they allow: [R], named in that folder's readme [S].
# * ISAAC's inputs are in two's complement, so its sums are positive and fit 8 bits. Ours have a sign: 9 bits = sign
#   + ISAAC's 8 (the sums of flipped columns are at most 128 * 3 / 2 = 192). Nothing is lost, as in ISAAC.
# * The on/off ratio of 1000 is taken as infinite: over 128 rows Gmin adds up to 128 * 3 / 999 = 0.38 of a level,
#   less than half a step, and rounds away. Removing it digitally as well would add an error.
_isaac = CrossbarConfig(
    cell=Cell(bits=(2,) * 8),
    encoding=Encoding(kind="offset", unit_column=True, flip=True),
    mapping=Mapping(weight_bits=16),
    dac=DAC(bits=16),
    adc=ADC(bits=9, range="granular"),
)

# Ankit et al., ASPLOS 2019. 128 x 128 arrays, 2-bit cells, 16-bit data, 1-bit DAC, 8-bit ADC, eight arrays for a
# matrix: puma-simulator's include/config.py [S]. One array for each slice has no room for a second polarity, hence
# offset encoding. The range of the ADC is not in that file: calibrated here. It loses bits by design.
_puma = CrossbarConfig(
    cell=Cell(bits=(2,) * 8),
    encoding=Encoding(kind="offset"),
    mapping=Mapping(weight_bits=16),
    dac=DAC(bits=16),
    adc=ADC(bits=8),
)

# Andrulis et al., ISCA 2023. 512 x 512 arrays of pairs of cells, 8-bit weights and inputs, 1-bit input slices
# ("recovery"), 7-bit signed ADC: CiMLoop's macro raella_isca_2023 [S]. Slices of 4, 2, 2 bits from the top, and an
# ADC step of one level, beyond whose range sums saturate: [R].
# 2 kOhm to 20 kOhm: CiMLoop's cell file, with the wire's resistance that it takes off [S]; the pair subtracts Gmin.
# Not modelled: centres other than zero (RAELLA stores w - centre with a centre for each filter, to bring sums nearer
# to zero: here differential encoding about zero, whose 7 bits leave half of the top slice's levels unused; CiMLoop's
# file has cells of 3 bits [S]), slices chosen layer by layer, speculation with wider input slices
# (which saves conversions and falls back on these slices), and negative inputs in a separate cycle.
_raella = CrossbarConfig(
    cell=Cell(bits=(2, 2, 4), on_off_ratio=10.0),
    mapping=Mapping(weight_bits=8),
    tile=Tile(rows=512, cols=512),
    dac=DAC(bits=8),
    adc=ADC(bits=7, range="granular"),
)

# Wan et al., Nature 608, 504 (2022). 256 x 256 arrays, differential, 8-bit ADC, up to 3 magnitude bits of input
# integrated before one conversion: CiMLoop's macro wan_nature_2022 [S]. Weights in one analogue cell, conductances
# from 1 to 40 uS, 4-bit inputs: [R]. Error of the cells: aihwkit's fit of the paper's figure, a day after
# programming. Write-verify (8.52 pulses a cell on average, [R]) is part of what was measured, so it is not simulated
# once more. Not modelled: the voltage-mode neuron, whose output is normalised by a column's summed conductance.
_neurram = CrossbarConfig(
    cell=Cell(bits=None, on_off_ratio=40.0),
    mapping=Mapping(weight_bits=None),
    tile=Tile(rows=256, cols=256),
    dac=DAC(bits=4),
    adc=ADC(bits=8, convert="sum"),
    device=Device(programming=RERAM_WAN_2022, time=86_400.0),
)

# aihwkit's `InferenceRPUConfig()` after `drift_analog_weights(time)` [S]: 512 x 512 tiles, phase-change memory, inputs
# in 126 steps from -1 to 1 after division by the largest, outputs in 510 steps from -12 to 12.
# * The largest weight of a matrix is full scale, as with `weight_scaling_omega=1`. By default weights are not scaled
#   there: for a largest weight of M, the bound and the noise of the output are 12 / M and 0.06 / M.
# * Not modelled: bound management (clipped rows are read again), and a scale of the inputs of every tile.
_aihwkit = CrossbarConfig(
    cell=Cell(bits=None),
    mapping=Mapping(weight_bits=None),
    tile=Tile(rows=512, cols=512),
    dac=DAC(bits=7, slice_bits=None),
    adc=ADC(bits=9, range="given", limits=((-12.0, 12.0),), noise=0.06),
    device=Device(
        programming=PCM_JOSHI_2020, drift=PCM_DRIFT, time=0.0, compensate=True
    ),
)

# CrossSim 3's `CrossSimParameters()` [S]: real-valued weights in pairs of cells with an on/off ratio of 10, arrays of
# 1024 x 1024, ideal converters and no errors.
_crosssim = CrossbarConfig(
    cell=Cell(bits=None, on_off_ratio=10.0),
    mapping=Mapping(weight_bits=None),
    tile=Tile(rows=1024, cols=1024),
    dac=None,
)

PRESETS = MappingProxyType(
    {
        "ideal": _ideal,
        "isaac": _isaac,
        "puma": _puma,
        "raella": _raella,
        "neurram": _neurram,
        "aihwkit": _aihwkit,
        "crosssim": _crosssim,
    }
)
"""Configurations by name."""
