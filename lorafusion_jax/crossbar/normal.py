"""Standard normal draws in bulk: those of `jax.random.normal`, bit for bit, at a fraction of its time on a CPU.

There `jax.random` computes Threefry-2x32 (Salmon et al., SC 2011) in a loop over rounds, which XLA cannot fuse with
what follows. Unrolled, bits, transform and the use of a draw become one pass over the result. The generator turns
counters into bits, so that any part of a large draw can be computed where it is needed.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Return `jax.random.normal(key, shape, dtype)`.

    Args:
      key: for other generators than Threefry `jax.random` itself is used, as it is for float64.
      shape: of the draws.
      dtype: floating point.
    """
    threefry = str(jax.random.key_impl(key)) == "threefry2x32" and jax.config.jax_threefry_partitionable
    if not threefry or dtype != jnp.float32 or math.prod(shape) >= 2**32:
        return jax.random.normal(key, shape, dtype)
    low = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        low += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(math.prod(shape[axis + 1 :]))
    return normal_at(jax.random.key_data(key), jnp.zeros_like(low), low)


def normal_at(words: UInt32[Array, "2"], high: UInt32[Array, "*S"], low: UInt32[Array, "*S"]) -> Float[Array, "*S"]:
    """Return the draws at places of one endless stream.

    Args:
      words: which stream: the data of a Threefry key.
      high: upper half of each place.
      low: lower half.
    """
    first, second = _threefry(words, high, low)
    # 23 random bits for the mantissa of a number in [1, 2), shifted to [-1, 1) and off -1.
    unit = jax.lax.bitcast_convert_type(((first ^ second) >> np.uint32(9)) | np.uint32(0x3F800000), jnp.float32) - 1
    least = np.nextafter(np.float32(-1), np.float32(0))
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(jnp.maximum(least, unit * (1 - least) + least))


def _threefry(words: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """Return 20 rounds of Threefry-2x32 of the counters (a, b)."""
    keys = (words[0], words[1], words[0] ^ words[1] ^ _PARITY)
    a, b = a + keys[0], b + keys[1]
    for i in range(5):
        for by in _ROTATIONS[i % 2]:
            a = a + b
            b = ((b << np.uint32(by)) | (b >> np.uint32(32 - by))) ^ a
        a = a + keys[(i + 1) % 3]
        b = b + keys[(i + 2) % 3] + np.uint32(i + 1)
    return a, b
