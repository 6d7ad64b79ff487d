"""Checks of numbers, names and options that users give, and of the libraries that these need."""

import contextlib
import dataclasses
import importlib
import warnings
from collections.abc import Collection, Iterable, Iterator
from types import ModuleType
from typing import Any


def at_least(least: int, **counts: int | float | None) -> None:
    """Raise a ValueError that names the first number below `least`; None is not checked."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{name} is {count}: expected at least {least}")


def check_uint32(**seeds: int) -> None:
    """Raise a ValueError that names the first seed which is not an unsigned integer of 32 bits.

    `jax.random.key` takes the last 32 bits of others, so that two of them may draw the same numbers.
    """
    for name, seed in seeds.items():
        if not 0 <= seed < 2**32:
            raise ValueError(
                f"{name} is {seed}: expected an integer from 0 to {2**32 - 1}"
            )


def one_of(choices: Collection[str], **names: str) -> None:
    """Raise a ValueError that tells the first of some names that is not among the choices."""
    for name, value in names.items():
        if value not in choices:
            raise ValueError(
                f"{name} is {value!r}: expected one of {', '.join(choices)}"
            )


def flags_given(options: Any, names: Iterable[str]) -> str:
    """Return those of some options that have other values than their defaults, as on the command line."""
    fields = {field.name: field for field in dataclasses.fields(options)}
    set_names = [
        name for name in names if getattr(options, name) != fields[name].default
    ]
    return ", ".join(f"--{name.replace('_', '-')}" for name in set_names)


def load_optional(name: str, *, extra: str, needed_by: str) -> ModuleType:
    """Return an optional dependency; raises a ValueError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{needed_by} needs {str(error.name).partition('.')[0]}, which is not installed: "
            f'pip install "lorafusion-jax[{extra}]"'
        ) from error


@contextlib.contextmanager
def panics() -> Iterator[None]:
    """Raise a ValueError for a panic of Rust code in the block, which is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"it panics: {error}") from error
