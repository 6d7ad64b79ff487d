"""A quantity that is known as a range, its arithmetic, and constants with their units and sources."""

import dataclasses
from collections.abc import Iterable

_SI = {"fJ": 1e-15, "pJ": 1e-12, "ns": 1e-9, "us": 1e-6, "1": 1.0}


@dataclasses.dataclass(frozen=True)
class Range:
    """A quantity as low, typical and high value, none negative. Sums, products and quotients are ranges again.

    A quotient with the same constant on both sides becomes too wide: pin such constants first (`Constants.pinned`).
    """

    low: float | int
    typical: float | int
    high: float | int

    def __post_init__(self):
        if not 0 <= self.low <= self.typical <= self.high:
            raise ValueError(f"{self}: give 0 <= low <= typical <= high")

    @classmethod
    def of(cls, value: float | int) -> "Range":
        """Return a value that is known exactly."""
        return cls(value, value, value)

    def __add__(self, other: "Range") -> "Range":
        return Range(
            self.low + other.low, self.typical + other.typical, self.high + other.high
        )

    def __mul__(self, other: "Range | float | int") -> "Range":
        other = other if isinstance(other, Range) else Range.of(other)
        return Range(
            self.low * other.low, self.typical * other.typical, self.high * other.high
        )

    def __truediv__(self, other: "Range | float | int") -> "Range":
        """Return the quotient by a value above zero."""
        other = other if isinstance(other, Range) else Range.of(other)
        return Range(
            self.low / other.high, self.typical / other.typical, self.high / other.low
        )

    def __pow__(self, exponent: int) -> "Range":
        ends = self.low**exponent, self.high**exponent
        return Range(min(ends), self.typical**exponent, max(ends))


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant as low, typical and high value in its unit.

    Attributes:
      unit: fJ, pJ, ns, us, or 1 for a pure number.
      source: source of all three values.
      meaning: description; a file of constants may leave it out.
    """

    unit: str
    low: float
    typical: float
    high: float
    source: str
    meaning: str = ""

    @property
    def range(self) -> Range:
        """The values in joules, seconds or as pure numbers."""
        return Range(self.low, self.typical, self.high) * _SI[self.unit]


def total(ranges: Iterable[Range]) -> Range:
    """Return the sum of ranges; zero without any."""
    return sum(ranges, start=Range.of(0.0))


def longest(ranges: Iterable[Range]) -> Range:
    """Return the largest low, typical and high value of ranges: the duration of parallel processes."""
    ends = zip(*map(dataclasses.astuple, ranges), strict=True)
    return Range(*map(max, ends))
