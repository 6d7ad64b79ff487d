"""Checks of numbers that users give."""


def at_least(least: int, **counts: int | None) -> None:
    """Raise a ValueError that names the first count below `least`; a count of None is not checked."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{name} is {count}: wanted at least {least}")
