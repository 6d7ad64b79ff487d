"""The slices of integer input codes, one at a time, for the kernels that never hold all of them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def digit(n: Float[Array, "*S"], slices: tuple[int, ...], j: int | Int[Array, ""]) -> Int[Array, "*S"]:
    """Return input slice j of the codes n: sign(n) ((|n| >> start) mod 2^bits)."""
    starts = jnp.asarray([sum(slices[:i]) for i in range(len(slices))], jnp.int32)
    tops = jnp.asarray([2**bits - 1 for bits in slices], jnp.int32)
    magnitude = (jnp.abs(n).astype(jnp.int32) >> starts[j]) & tops[j]
    return jnp.where(n < 0, -magnitude, magnitude)


def significance(slices: tuple[int, ...]) -> tuple[float, ...]:
    """Return the value of one level of every input slice, in levels of the first."""
    return tuple(2.0 ** sum(slices[:j]) for j in range(len(slices)))
