"""Checks of numbers and names that users give."""

from collections.abc import Collection


def at_least(least: int, **counts: int | None) -> None:
    """Raise a ValueError that names the first count below `least`; a count of None is not checked."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{name} is {count}: expected at least {least}")


def check_uint32(**seeds: int) -> None:
    """Raise a ValueError that names the first seed which is not an unsigned integer of 32 bits.

    `jax.random.key` takes the last 32 bits of others, so that two of them may draw the same numbers.
    """
    for name, seed in seeds.items():
        if not 0 <= seed < 2**32:
            raise ValueError(f"{name} is {seed}: expected an integer from 0 to {2**32 - 1}")


def one_of(choices: Collection[str], **names: str) -> None:
    """Raise a ValueError that tells the first of some names that is not among the choices."""
    for name, value in names.items():
        if value not in choices:
            raise ValueError(f"{name} is {value!r}: expected one of {', '.join(choices)}")
