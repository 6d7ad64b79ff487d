"""Stacks of narrow numbers, as a loop over layers on a CPU slices them well.

XLA's CPU compiler slices no bfloat16 and no 4-bit numbers: ahead of a loop it makes float32 or 8-bit copies of whole
stacks and slices those, and what a loop stacks up, results or what its backward pass keeps, it stacks in float32.
Integers of 16 and 8 bits it takes as they are. So loops are given the bits. Gradients of a stack itself, and what a
loop keeps that is neither carried nor `kept`, stay as they were.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

_HALF_BYTES = (jnp.int4, jnp.uint4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bits:
    """An array of narrow numbers as integers.

    Attributes:
      bits: of the numbers; a byte holds two of four bits.
      numbers: the array itself, for its type, shape and gradient; its values are not read.
    """

    bits: Array
    numbers: Array


def to_bits(tree: Any) -> Any:
    """Return the tree with its arrays of bfloat16 and of 4-bit numbers as `Bits`, on a CPU; unchanged elsewhere."""
    return jax.tree.map(_to_bits, tree) if jax.default_backend() == "cpu" else tree


def from_bits(tree: Any) -> Any:
    """Return the tree that `to_bits` was given, or one layer of it."""
    return jax.tree.map(lambda a: _read(a.bits, a.numbers) if _is_bits(a) else a, tree, is_leaf=_is_bits)


def _to_bits(numbers: Array) -> Array | Bits:
    if numbers.dtype == jnp.bfloat16:
        return Bits(jax.lax.bitcast_convert_type(numbers, jnp.uint16), numbers)
    if numbers.dtype in _HALF_BYTES and numbers.ndim > 1 and numbers.shape[-1] % 2 == 0:
        pairs = numbers.reshape(*numbers.shape[:-1], -1, 2)
        return Bits(jax.lax.bitcast_convert_type(pairs, jnp.uint8), numbers)
    return numbers


def _numbers(bits: Array, like: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, like.dtype).reshape(like.shape)


# Derivatives go by the numbers, not by the bits. The rules call plain functions: a call of a `custom_jvp` would hide
# what is in it from a policy of `jax.checkpoint`.
_read = jax.custom_jvp(_numbers)
_read.defjvp(lambda primals, tangents: (_numbers(*primals), tangents[1]))


def _kept(x: Array, name: str) -> Array:
    """Return bfloat16 `x`, which a policy of `jax.checkpoint` that saves `name` keeps as bits."""
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


kept = jax.custom_jvp(_kept, nondiff_argnums=(1,))
kept.defjvp(lambda name, primals, tangents: (_kept(primals[0], name), tangents[0]))


def _is_bits(leaf: Any) -> bool:
    return isinstance(leaf, Bits)
