"""The slices of integer input codes, one at a time, for the kernels that never hold all of them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def digit(n: Float[Array, "*S"], slices: tuple[int, ...], j: int) -> Int[Array, "*S"]:
    """Return input slice j of the codes n: sign(n) ((|n| >> start) mod 2^bits).

    Args:
      n: integers.
      slices: bits of every input slice, least significant first.
      j: which.
    """
    magnitude = (jnp.abs(n).astype(jnp.int32) >> start(slices, j)) & (2 ** slices[j] - 1)
    return jnp.where(n < 0, -magnitude, magnitude)


def start(slices: tuple[int, ...], j: int) -> int:
    """Return the number of bits below slice j: its level is worth 2^start."""
    return sum(slices[:j])
