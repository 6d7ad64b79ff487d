"""A ramp, or a counter of an oscillator's periods (HERMES-Core): one step for every code, all columns together."""

from ...cost.ranges import Constant, Range
from .architecture import Architecture, Table


def energy(bits: int, constants: Table) -> Range:
    """Return the joules of one conversion: those of 8 bits, shared out over the steps."""
    return constants["adc_energy"] * 2.0 ** (bits - 8)


def time(bits: int, columns: int, constants: Table) -> Range:
    """Return the seconds in which an array is converted: 2^bits steps, however many columns there are."""
    return constants["ramp_step_time"] * 2**bits


RAMP = Architecture(
    energy=energy,
    time=time,
    constants={
        "ramp_step_time": Constant(
            "ns", 0.3, 1.0, 10.0,
            "low: [S] HERMES-Core, title: 300 ps a code; typical: [S] its main clock of 1 GHz; high: [A] 100 MHz",
            "of one step of a ramp ADC, which takes 2^bits of them",
        )
    },
)  # fmt: skip
