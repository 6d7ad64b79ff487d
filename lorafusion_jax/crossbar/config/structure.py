"""Split of a configuration into static structure and arrays."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

_ARRAY = jax.Array | np.ndarray


class Structure(NamedTuple):
    """A configuration without its arrays: hashable, so that stacks can be scanned and programs cached.

    Plain numbers are structure, compiled in as constants; a value that is swept or learned is an array.

    Attributes:
      tree: pytree structure of the configuration.
      numbers: its leaves, with None instead of arrays.
      classes: classes of its parts, including device models; jaxlib 0.10 ignores them when it compares trees.
    """

    tree: Any
    numbers: tuple[Any, ...]
    classes: tuple[type, ...]

    def config(self, values: Iterable[Any]) -> Any:
        """Return the configuration, or the tuple of them, with these arrays."""
        arrays = iter(values)
        return jax.tree.unflatten(
            self.tree, [next(arrays) if n is None else n for n in self.numbers]
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of its arrays, such as `device.read_noise.sigma`."""
        config = self.config([object()] * self.numbers.count(None))
        return tuple(
            jax.tree_util.keystr(path, simple=True, separator=".")
            for (path, _), number in zip(
                jax.tree.leaves_with_path(config), self.numbers, strict=True
            )
            if number is None
        )


def split_config(config: Any) -> tuple[Structure, list[Any]]:
    """Return the structure and the arrays of a configuration, or of a tuple of them."""
    leaves, tree = jax.tree.flatten(config)
    arrays = [leaf for leaf in leaves if isinstance(leaf, _ARRAY)]
    numbers = tuple(None if isinstance(leaf, _ARRAY) else leaf for leaf in leaves)
    return Structure(tree, numbers, tuple(_classes(config))), arrays


def _classes(part: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(part):
        yield type(part)
        for field in dataclasses.fields(part):
            yield from _classes(getattr(part, field.name))
    elif isinstance(part, tuple):
        for item in part:
            yield from _classes(item)
