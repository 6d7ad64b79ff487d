"""Checks of numbers and names that users give."""

from collections.abc import Collection


def at_least(least: int, **counts: int | None) -> None:
    """Raise a ValueError that names the first count below `least`; a count of None is not checked."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{name} is {count}: wanted at least {least}")


def of_64_bits(**numbers: int) -> None:
    """Raise a ValueError that names the first number which is not a signed integer of 64 bits, as seeds must be."""
    for name, number in numbers.items():
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"{name} is {number}: wanted an integer of 64 bits")


def one_of(choices: Collection[str], **names: str) -> None:
    """Raise a ValueError that tells the first of some names that is not among the choices."""
    for name, value in names.items():
        if value not in choices:
            raise ValueError(f"{name} is {value!r}: wanted one of {', '.join(choices)}")
