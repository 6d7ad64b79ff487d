"""A configuration as static structure and arrays, and what makes two configurations different crossbars."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from .config import CrossbarConfig


class Structure(NamedTuple):
    """A configuration without its arrays: hashable, so that stacks can be scanned and programs cached.

    Plain numbers are structure, compiled in as constants; a value that is swept or learned is an array.

    Attributes:
      tree: of the configuration.
      numbers: its leaves, None where there is an array.
      classes: of its parts, device models among them: jaxlib 0.10 takes trees for equal that differ in these alone.
    """

    tree: Any
    numbers: tuple[Any, ...]
    classes: tuple[type, ...]

    def config(self, values: Iterable[Any]) -> CrossbarConfig:
        """Return the configuration with these arrays."""
        arrays = iter(values)
        return jax.tree.unflatten(self.tree, [next(arrays) if n is None else n for n in self.numbers])

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of its arrays, as in `device.read_noise.sigma`."""
        paths, _ = jax.tree.flatten_with_path(jax.tree.unflatten(self.tree, [object()] * len(self.numbers)))
        return tuple(
            jax.tree_util.keystr(path, simple=True, separator=".")
            for (path, _), number in zip(paths, self.numbers, strict=True)
            if number is None
        )


def split_config(config: CrossbarConfig) -> tuple[Structure, list[Any]]:
    """Return a configuration's structure and its arrays."""
    leaves, tree = jax.tree.flatten(config)
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    numbers = tuple(None if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
    return Structure(tree, numbers, tuple(_classes(config))), [
        leaf for leaf, array in zip(leaves, is_array, strict=True) if array
    ]


def _classes(part: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(part):
        yield type(part)
        for field in dataclasses.fields(part):
            yield from _classes(getattr(part, field.name))
