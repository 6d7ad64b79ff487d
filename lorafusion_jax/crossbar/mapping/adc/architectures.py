"""Architectures of ADCs. A new one is an entry of `ARCHITECTURES`; outside this file, call `register_adc`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from ...cost.ranges import Constant, Range


@runtime_checkable
class Table(Protocol):
    """A table of constants in joules, seconds or as pure numbers (see `cost.energy`)."""

    def __getitem__(self, name: str) -> Range: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of ADCs.

    Attributes:
      energy: (bits, constants) to the joules of one conversion.
      time: (bits, columns, constants) to the seconds in which all columns of an array are converted.
      transfer: (sums, lowest code, highest code), all in units of a code, to what is rounded and clipped instead of the
        sums; None for the sums themselves. Such an ADC is read conversion by conversion (path `definition`).
      constants: its constants, by name. A file of constants may replace them.
    """

    energy: Callable[[int, Table], Range]
    time: Callable[[int, int, Table], Range]
    transfer: Callable[[Float[Array, "..."], int, int], Float[Array, "..."]] | None = (
        None
    )
    constants: Mapping[str, Constant] = dataclasses.field(default_factory=dict)


def _sar_time(bits: int, columns: int, constants: Table) -> Range:
    """Return the seconds in which an array is converted: at most `columns_per_adc` columns take turns."""
    sharing = dataclasses.astuple(constants["columns_per_adc"])
    turns = Range(*(min(float(columns), most) for most in sharing))
    return constants["adc_time"] * turns


ARCHITECTURES: dict[str, Architecture] = {
    # Successive approximation, one bit in each step; the columns of an array take turns at a few fast converters.
    "sar": Architecture(
        # The energy of 8 bits, times `adc_growth` for each further bit.
        energy=lambda bits, constants: constants["adc_energy"] * constants["adc_growth"] ** (bits - 8),
        time=_sar_time,
    ),
    # A ramp, or a counter of an oscillator's periods (HERMES-Core): one step for every code, all columns together.
    "ramp": Architecture(
        # The energy of 8 bits is shared out over the 2^bits steps, which are as many for any number of columns.
        energy=lambda bits, constants: constants["adc_energy"] * 2.0 ** (bits - 8),
        time=lambda bits, columns, constants: constants["ramp_step_time"] * 2**bits,
        constants={
            "ramp_step_time": Constant(
                "ns", 0.3, 1.0, 10.0,
                "low: [S] HERMES-Core, title: 300 ps a code; typical: [S] its main clock of 1 GHz; high: [A] 100 MHz",
                "of one step of a ramp ADC, which takes 2^bits of them",
            )
        },
    ),
}  # fmt: skip
"""By the name that `ADC.architecture` has."""


def register_adc(name: str, architecture: Architecture) -> None:
    """Add an architecture, so that `ADC(architecture=name)` and files of configurations can name it.

    Call it before such a configuration, or a chip that was saved with one, is read. Raises a ValueError for a name that
    another architecture has.
    """
    if ARCHITECTURES.setdefault(name, architecture) is not architecture:
        raise ValueError(
            f"there is an ADC architecture {name!r}: choose another name than {', '.join(ARCHITECTURES)}"
        )
