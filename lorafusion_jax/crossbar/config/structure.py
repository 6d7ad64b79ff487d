"""Split of a configuration into static structure and arrays, and the comparison of two configurations."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from .schema import ADC, DAC, CrossbarConfig


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

    def config(self, values: Iterable[Any]) -> CrossbarConfig:
        """Return the configuration with these arrays."""
        arrays = iter(values)
        return jax.tree.unflatten(self.tree, [next(arrays) if n is None else n for n in self.numbers])

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of its arrays, such as `device.read_noise.sigma`."""
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


def _structure_of_arrays(config: CrossbarConfig) -> Structure:
    """Return the structure of a configuration without settings of a read, of calibration and of warnings."""
    adc, dac, noise = config.adc, config.dac, config.device.read_noise
    if adc is not None:
        of_conversions = None if adc.noise is None else 0.0
        adc = dataclasses.replace(adc, quantile=ADC.quantile, clip_share=ADC.clip_share, noise=of_conversions)
    if dac is not None:
        dac = dataclasses.replace(dac, quantile=DAC.quantile, clip_share=DAC.clip_share, rounding="nearest")
    if noise is not None:
        noise = dataclasses.replace(noise, sigma=0.0)
    device = dataclasses.replace(config.device, read_noise=noise)
    return split_config(dataclasses.replace(config, adc=adc, dac=dac, device=device))[0]


def check_same(programmed: CrossbarConfig, config: CrossbarConfig) -> None:
    """Raise a ValueError that names the differences of two configurations; swept values and functions may differ."""
    of_arrays = [_structure_of_arrays(each) for each in (programmed, config)]
    if of_arrays[0] == of_arrays[1]:
        return
    here, there = (each.config([_Swept()] * each.numbers.count(None)) for each in of_arrays)
    if different := list(_differences(here, there, "")):
        raise ValueError(
            f"these arrays were programmed with another configuration: {'; '.join(different)}. Read them with their "
            "own, or program the weights again"
        )


class _Swept:
    """Placeholder of an array, whose values are not compared."""

    def __repr__(self) -> str:
        return "an array"


def _differences(programmed: Any, asked: Any, where: str) -> Iterator[str]:
    swept = isinstance(programmed, _Swept) or isinstance(asked, _Swept)
    if swept and programmed is not None and asked is not None:
        return
    if dataclasses.is_dataclass(programmed) and type(programmed) is type(asked):
        for field in dataclasses.fields(programmed):
            name = f"{where}.{field.name}" if where else field.name
            yield from _differences(getattr(programmed, field.name), getattr(asked, field.name), name)
    elif isinstance(programmed, tuple) and isinstance(asked, tuple) and len(programmed) == len(asked):
        for i, (one, other) in enumerate(zip(programmed, asked, strict=True)):
            yield from _differences(one, other, f"{where}[{i}]")
    elif isinstance(programmed, jax.tree_util.Partial) and isinstance(asked, jax.tree_util.Partial):
        return
    elif programmed != asked:
        yield f"{where} = {asked!r}, not {programmed!r}"


def _classes(part: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(part):
        yield type(part)
        for field in dataclasses.fields(part):
            yield from _classes(getattr(part, field.name))
