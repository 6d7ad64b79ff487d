"""Successive approximation, one bit in each step; the columns of an array take turns at a few fast converters."""

from ...cost.ranges import Range
from .architecture import Architecture, Table


def energy(bits: int, constants: Table) -> Range:
    """Return the joules of one conversion: those of 8 bits, times `adc_growth` for each further bit."""
    return constants["adc_energy"] * constants["adc_growth"] ** (bits - 8)


def time(bits: int, columns: int, constants: Table) -> Range:
    """Return the seconds in which an array is converted: at most `columns_per_adc` columns take turns."""
    sharing = constants["columns_per_adc"]
    turns = Range(*(min(float(columns), most) for most in (sharing.low, sharing.typical, sharing.high)))
    return constants["adc_time"] * turns


SAR = Architecture(energy=energy, time=time)
