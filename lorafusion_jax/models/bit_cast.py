"""Stacks of bfloat16 and 4-bit numbers, held as integers so that loops over layers on a CPU slice them without copies.

XLA's CPU compiler cannot slice bfloat16 and 4-bit numbers. Before a loop it makes float32 or 8-bit copies of whole
stacks and slices those. It also stacks a loop's results, and the values kept for the backward pass, in float32.
Integers of 16 and 8 bits are sliced without copies, so loops are given the bits. Gradients of a stack itself are not
converted, nor are kept values that are neither carried nor marked by `kept`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Shaped

from ..support.platform import for_cpu

_HALF_BYTES = (jnp.int4, jnp.uint4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bits:
    """An array of bfloat16 or 4-bit numbers as integers.

    A byte holds two 4-bit numbers. `array` is the array itself, for its type, shape and gradient.
    """

    bits: Array
    array: Array


def to_bits(tree: Any) -> Any:
    """Return the tree with its arrays of bfloat16 and of 4-bit numbers as `Bits`, on a CPU; unchanged elsewhere."""
    return jax.tree.map(_to_bits, tree) if for_cpu() else tree


def from_bits(tree: Any) -> Any:
    """Return the original of a tree from `to_bits`, or of one layer of it."""
    return jax.tree.map(
        lambda a: _read(a.bits, a.array) if _is_bits(a) else a, tree, is_leaf=_is_bits
    )


def pack(array: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Return an array in the type in which a loop on a CPU can update it in place: bits instead of bfloat16."""
    if array.dtype == jnp.bfloat16 and for_cpu():
        return jax.lax.bitcast_convert_type(array, jnp.uint16)
    return array


def unpack(array: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Return the original of an array from `pack`, or of a part of it."""
    if array.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(array, jnp.bfloat16)
    return array


def _to_bits(array: Array) -> Array | Bits:
    if array.dtype == jnp.bfloat16:
        return Bits(jax.lax.bitcast_convert_type(array, jnp.uint16), array)
    if array.dtype in _HALF_BYTES and array.ndim > 1 and array.shape[-1] % 2 == 0:
        pairs = array.reshape(*array.shape[:-1], -1, 2)
        return Bits(jax.lax.bitcast_convert_type(pairs, jnp.uint8), array)
    return array


def _original(bits: Array, like: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, like.dtype).reshape(like.shape)


# Derivatives use the array itself, not the bits. The rules call plain functions, because a call of a `custom_jvp`
# would hide its content from a policy of `jax.checkpoint`.
_read = jax.custom_jvp(_original)
_read.defjvp(lambda primals, tangents: (_original(*primals), tangents[1]))


def _kept(x: Array, name: str) -> Array:
    """Return `x`, marked so that a policy of `jax.checkpoint` that saves `name` keeps it, or the bits of bfloat16."""
    return unpack(checkpoint_name(pack(x), name))


kept = jax.custom_jvp(_kept, nondiff_argnums=(1,))
kept.defjvp(lambda name, primals, tangents: (_kept(primals[0], name), tangents[0]))


def _is_bits(leaf: Any) -> bool:
    return isinstance(leaf, Bits)
