"""Architectures of ADCs. A new one is a file here and a line in `ARCHITECTURES`; outside, call `register_adc`."""

from .architecture import Architecture
from .ramp import RAMP
from .sar import SAR

ARCHITECTURES: dict[str, Architecture] = {
    "sar": SAR,
    "ramp": RAMP,
}
"""By the name that `ADC.architecture` has."""


def register_adc(name: str, architecture: Architecture) -> None:
    """Add an architecture, so that `ADC(architecture=name)` and files of configurations can name it.

    Call it before such a configuration, or a chip that was saved with one, is read. Raises a ValueError for a name that
    another architecture has.
    """
    if ARCHITECTURES.setdefault(name, architecture) is not architecture:
        raise ValueError(f"there is an ADC architecture {name!r}: choose another name than {', '.join(ARCHITECTURES)}")
