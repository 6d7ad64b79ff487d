"""Standard normal draws in bulk, at a fraction of the time of `jax.random.normal` on a CPU.

Threefry-2x32 (Salmon et al., SC 2011) turns counters into bits, so that any part of a large draw can be computed
where it is needed. On a CPU `jax.random` runs its rounds in a loop, which XLA cannot fuse; here they are unrolled. With
13 rounds or more no statistical flaw is known (Random123, threefry.h); `jax.random` has 20.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = np.uint32(0x1BD11BDA)
_ROUNDS = 13
_BLOCK = 2**16

# sqrt(2) erfinv(x) / x as a polynomial of v = w / 8 - 1, with w = -log(1 - x^2) in [0, 16], lowest power first: a
# least relative error fit, 4e-7 in float32, where the two polynomials of XLA's erf_inv (Giles, 2010) leave 6e-6.
_QUANTILE = np.array(
    [
        3.7638425827, 1.9952514172, -0.4575642645, 0.1779465824, -0.0516043231, -0.0240287669, 0.0597133897,
        -0.0557358861, 0.0455692224, -0.0435479023, 0.0011485738, 0.0511493012, -0.0294824950, -0.0125546576,
        0.0101715485,
    ],
    np.float32,
)  # fmt: skip


def normal(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, "..."]:
    """Return standard normal draws: of `jax.random.normal` for float64 and for generators other than Threefry."""
    by_counter = jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    threefry = str(jax.random.key_impl(key)) == "threefry2x32" and by_counter
    if not threefry or dtype != jnp.float32 or math.prod(shape) >= 2**32:
        return jax.random.normal(key, shape, dtype)
    words = jax.random.key_data(key)
    size = math.prod(shape)
    block = max(1, min(size, _BLOCK))

    def draw(first: UInt32[Array, ""]) -> Float[Array, " block"]:
        low = first + jax.lax.iota(jnp.uint32, block)
        return normal_at(words, jnp.zeros_like(low), low)

    # In a loop, whose result is in memory: XLA would else draw anew in every operation that reads it.
    blocks = jax.lax.map(draw, jnp.arange(0, size, block, dtype=jnp.uint32))
    return blocks.reshape(-1)[:size].reshape(shape)


def normal_at(
    words: UInt32[Array, "2"], high: UInt32[Array, "*S"], low: UInt32[Array, "*S"]
) -> Float[Array, "*S"]:
    """Return the draws at places (high, low) of one endless stream, selected by the data of a Threefry key."""
    first, second = _threefry(words, high, low)
    # 23 random bits for the mantissa of a number in [1, 2), shifted to [-1, 1) and off -1.
    unit = (
        jax.lax.bitcast_convert_type(
            ((first ^ second) >> np.uint32(9)) | np.uint32(0x3F800000), jnp.float32
        )
        - 1
    )
    least = np.nextafter(np.float32(-1), np.float32(0))
    x = jnp.maximum(least, unit * (1 - least) + least)
    v = -jnp.log((1 - x) * (1 + x)) * np.float32(0.125) - 1
    quantile = jnp.full_like(v, _QUANTILE[-1])
    for coefficient in _QUANTILE[-2::-1]:
        quantile = quantile * v + coefficient
    return x * quantile


def _threefry(words: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """Return Threefry-2x32 of the counters (a, b)."""
    keys = (words[0], words[1], words[0] ^ words[1] ^ _PARITY)
    a = a + keys[0]
    b = b + keys[1]
    for i in range(_ROUNDS):
        by = _ROTATIONS[i % 8]
        a = a + b
        b = ((b << np.uint32(by)) | (b >> np.uint32(32 - by))) ^ a
        if i % 4 == 3:
            group = i // 4 + 1
            a = a + keys[group % 3]
            b = b + keys[(group + 1) % 3] + np.uint32(group)
    return a, b
