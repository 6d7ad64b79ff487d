"""Stacks of layers whose weights differ in kind: some in arrays, some digital, some in other arrays.

One scan needs one kind of weight, so a stack with several kinds is a `Segments`, and is scanned part by part.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
    """Consecutive layers in parts of any kind; each part is stacked separately."""

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all layers together."""
        return (self.ends[-1], *self.parts[0].shape[1:])

    @property
    def ends(self) -> tuple[int, ...]:
        """Number of the layer after the last one of every part."""
        return tuple(itertools.accumulate(map(_depth, self.parts)))


def scan_layers(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, stacked: Any, *, unroll: bool = False
) -> tuple[Any, Any]:
    """Return the last carry and all outputs of `jax.lax.scan` over layers, with one scan for each kind of them."""
    outputs = []
    for part in _parts(stacked):
        carry, output = jax.lax.scan(body, carry, part, unroll=unroll)
        outputs.append(output)
    return carry, _joined(outputs)


def map_layers(fn: Callable[[Any], Any], stacked: Any, *, batch_size: int | None = None) -> Any:
    """Return `jax.lax.map` over layers; the arguments are those of `scan_layers`."""
    return _joined([jax.lax.map(fn, part, batch_size=batch_size) for part in _parts(stacked)])


def _parts(stacked: Any) -> list[Any]:
    """Return the parts of a tree, split where any of its stacks changes its kind."""
    leaves, tree = jax.tree.flatten(stacked, is_leaf=lambda leaf: isinstance(leaf, Segments))
    ends = {end for leaf in leaves if isinstance(leaf, Segments) for end in leaf.ends}
    if not ends:
        return [stacked]
    cuts = itertools.pairwise(sorted({0, *ends}))
    return [tree.unflatten([_between(leaf, *cut) for leaf in leaves]) for cut in cuts]


def _between(leaf: Any, start: int, stop: int) -> Any:
    """Return layers start to stop of a leaf; in `Segments` they must be within one part."""
    if not isinstance(leaf, Segments):
        return leaf[start:stop]
    part, end = next((part, end) for part, end in zip(leaf.parts, leaf.ends, strict=True) if stop <= end)
    first = end - _depth(part)
    return jax.tree.map(lambda a: a[start - first : stop - first], part)


def _joined(outputs: list[Any]) -> Any:
    return outputs[0] if len(outputs) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def _depth(part: Any) -> int:
    return jax.tree.leaves(part)[0].shape[0]
