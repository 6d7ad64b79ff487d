"""A weight that sits in arrays: what a model's tree holds in place of a matrix.

Axis letters: L layer, N module; a leaf of a stack has them in front, and a scan or `jax.vmap` takes them off.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..calibration.one_chip import Statistics, probe
from ..config.schema import CrossbarConfig
from ..config.structure import Structure
from ..read.matmul import mvm
from .program import ArrayState, programmed_weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Programmed:
    """A programmed matrix, or a stack of them, with all that a read needs.

    Attributes:
      state: the arrays.
      values: the arrays among the configuration's values, each with the stack's leading axes.
      structure: the rest of the configuration.
      key: of the reads; None without read noise. `reads` makes the keys of one read of it.
      tap: zeros; the gradient with respect to them is the statistics of all reads (see `calibration`), or None.
      name: of the weight, as rules and reports call it.
      first: the number of its first layer, where the stack was split.
    """

    state: ArrayState
    values: list[Any]
    structure: Structure = dataclasses.field(metadata={"static": True})
    key: Any = None
    tap: Statistics | None = None
    name: str = dataclasses.field(default="", metadata={"static": True})
    first: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def config(self) -> CrossbarConfig:
        """Of the crossbar."""
        return self.structure.config(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights: [..., d_in, d_out]."""
        return self.state.codes.shape

    def read(self, x: Float[Array, "*B d_in"]) -> Float[Array, "*B d_out"]:
        """Return what the arrays make of `x @ W`, in the dtype of `x`."""
        if self.tap is None:
            return mvm(x, self.state, self.config, self.key)
        leaves, tree = jax.tree.flatten(dataclasses.replace(self, tap=None))
        return _tapped(tree, x, tuple(jax.tree.leaves(self.tap)), leaves)

    def weights(self) -> Float[Array, "*N d_in d_out"]:
        """Return the weights as programmed."""

        def of_one(state: ArrayState, values: list[Any]) -> Array:
            return programmed_weights(state, self.structure.config(values))

        return over_stack(of_one, self.shape[:-2])(self.state, self.values)


def over_stack(fn: Callable[..., Any], lead: tuple[int, ...]) -> Callable[..., Any]:
    """Return `fn` mapped over the leading axes of a stack."""
    for _ in lead:
        fn = jax.vmap(fn)
    return fn


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(
    tree: Any, x: Float[Array, "*B d_in"], tap: tuple[Array, ...], weight: list[Any]
) -> Float[Array, "*B d_out"]:
    """Read, and hand the statistics out as the gradient of `tap`.

    Gradients add up over calls and leave scans stacked by layer: all that collecting statistics asks for. No other
    gradient is passed on, so that collecting costs no products.

    Args:
      tree: structure of the weight.
      x: inputs.
      tap: the fields of the statistics.
      weight: the leaves of a weight without tap. (JAX would rebuild a dataclass with placeholders.)
    """
    return _probe(tree, x, weight)[0]


def _probe(tree: Any, x: Array, leaves: list[Any]) -> tuple[Array, Statistics]:
    weight = jax.tree.unflatten(tree, leaves)
    return probe(x, weight.state, weight.config, weight.key)


def _tapped_forward(tree, x, tap, leaves):
    y, statistics = _probe(tree, x, leaves)
    return y, (tuple(jax.tree.leaves(statistics)), x)


def _tapped_backward(tree, residuals, cotangent):
    statistics, x = residuals
    return jnp.zeros_like(x), statistics, None


_tapped.defvjp(_tapped_forward, _tapped_backward)


def is_programmed(leaf: Any) -> bool:
    """Whether a leaf of a tree of weights sits in arrays."""
    return isinstance(leaf, Programmed)


def fold(keys: Array, number: Array | int) -> Array:
    """Return `jax.random.fold_in(key, number)` of keys of any shape."""
    folded = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys.reshape(-1))
    return folded.reshape(keys.shape)


def reads(tree: Any, *numbers: Array | int) -> Any:
    """Return a tree of weights whose next reads draw noise of their own.

    A key that sits still gives the same noise at every step: call this before every training step, every decoded
    token and every batch, with numbers that have not been used for another.

    Args:
      tree: weights, some of them programmed. Without read noise it is returned as it is.
      numbers: of the read, for example (seed, step).
    """

    def of_leaf(leaf: Any) -> Any:
        if not is_programmed(leaf) or leaf.key is None:
            return leaf
        key = leaf.key
        for number in numbers:
            key = fold(key, number)
        return dataclasses.replace(leaf, key=key)

    return jax.tree.map(of_leaf, tree, is_leaf=is_programmed)


def stacked_keys(key: Array, numbers: Sequence[Int[Array, " _size"]]) -> Array:
    """Return a key for every matrix of a stack, folded axis by axis: entry (l, n) has fold_in(fold_in(key, l), n).

    Args:
      key: of the weight.
      numbers: l, n, ... of the entries of every axis.
    """
    for of_axis in numbers:
        key = jax.vmap(fold, in_axes=(None, 0), out_axes=-1)(key, of_axis)
    return key
