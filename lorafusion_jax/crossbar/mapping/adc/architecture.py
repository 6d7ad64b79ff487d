"""The interface of an ADC architecture: how it departs from an ideal quantiser, and what a conversion costs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from ...cost.ranges import Constant, Range


@runtime_checkable
class Table(Protocol):
    """A table of constants in joules, seconds or as pure numbers (see `cost.constants`)."""

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
    transfer: Callable[[Float[Array, "..."], int, int], Float[Array, "..."]] | None = None
    constants: Mapping[str, Constant] = dataclasses.field(default_factory=dict)
