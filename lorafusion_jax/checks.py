"""Checks of numbers that users give."""


def at_least(least: int, **counts: int | None) -> None:
    """Raise ValueError for the first count that is below the least, by its name; None was not given."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{name} is {count}: wanted at least {least}")
