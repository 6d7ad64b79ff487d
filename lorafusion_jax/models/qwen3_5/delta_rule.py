"""The gated delta rule: a memory that every token lets fade, and corrects at its key.

    memory <- exp(decay) memory;  memory <- memory + beta key (value - key memory);  output = query memory / sqrt(K)

Tokens are computed in chunks. Within one, the corrections solve a triangular system of equations, so that only chunks
follow each other. Source: Yang et al., "Gated Delta Networks" (2024), and transformers.

Axis letters: B batch, T target, G heads of keys, H heads of values, K key width, V value width, N chunks, C
tokens of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CHUNK = 64
_EPS = 1e-6


def delta_rule(
    queries: Float[Array, "B T G K"],
    keys: Float[Array, "B T G K"],
    values: Float[Array, "B T H V"],
    decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    memory: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Return the outputs of all tokens, and the memory after them; `decay` is at most 0.

    Queries and keys are normalised here; each head of them serves H / G heads of values.
    """
    length = queries.shape[1]
    chunk = min(1 << (length - 1).bit_length(), CHUNK)  # a power of two

    def normalised(a: Array) -> Array:
        a = a * jax.lax.rsqrt(jnp.sum(jnp.square(a), axis=-1, keepdims=True) + _EPS)
        return jnp.repeat(a, values.shape[2] // a.shape[2], axis=2)

    def in_chunks(a: Array) -> Array:
        """Return [B, T, H, ...] as [N, B, H, C, ...], filled up with zeros."""
        a = jnp.pad(a, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(
            a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), (1, 3), (0, 2)
        )

    queries = normalised(queries) * queries.shape[-1] ** -0.5
    q, k, v, g, b = map(in_chunks, (queries, normalised(keys), values, decay, beta))
    faded = jnp.cumsum(g, axis=-1)  # since the chunk began
    causal = jnp.tril(jnp.ones((1, 1, 1, chunk, chunk), bool))
    between = jnp.exp(
        jnp.where(causal, faded[..., :, None] - faded[..., None, :], -jnp.inf)
    )
    weighted_keys = k * b[..., None]
    overlap = jnp.tril((weighted_keys @ jnp.swapaxes(k, -1, -2)) * between, -1)
    scores = (q @ jnp.swapaxes(k, -1, -2)) * between
    since = jnp.exp(faded)[..., None]
    unsolved = jnp.concatenate([v * b[..., None], weighted_keys * since], axis=-1)
    solved = _solved(overlap, unsolved)
    until = jnp.exp(faded[..., -1:] - faded)[..., None]

    def step(memory: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        new, read, scores, q, k, decay_of_memory = chunk
        corrections = new - read @ memory
        outputs = q @ memory + scores @ corrections
        return memory * decay_of_memory + jnp.swapaxes(k, -1, -2) @ corrections, outputs

    new, read = jnp.split(solved, [values.shape[-1]], axis=-1)
    memory, outputs = jax.lax.scan(
        step, memory, (new, read, scores, q * since, k * until, since[..., -1:, :])
    )
    outputs = jnp.moveaxis(outputs, (0, 2), (1, 3))
    return outputs.reshape(outputs.shape[0], -1, *outputs.shape[3:])[:, :length], memory


def _solved(
    below: Float[Array, "*B C C"], right: Float[Array, "*B C D"]
) -> Float[Array, "*B C D"]:
    """Return the x with `x + below x = right`, given numbers below the diagonal alone; C is a power of two.

    By products, as fast as `triangular_solve`: two calls of that in one program wait for each other for ever on two
    cores (jaxlib 0.10.2, see `adapters.pool`).
    """
    multiply = partial(jnp.matmul, precision="highest")
    size = below.shape[-1]
    inverse = jnp.ones((*below.shape[:-2], size, 1, 1), below.dtype)
    while (count := inverse.shape[-3] // 2) > 0:
        # Two blocks on the diagonal become one: the inverse of [[A, 0], [C, B]] has -B^-1 C A^-1 in its corner.
        first = inverse[..., ::2, :, :]
        second = inverse[..., 1::2, :, :]
        parts = below.reshape(
            *below.shape[:-2],
            count,
            2,
            size // count // 2,
            count,
            2,
            size // count // 2,
        )
        corners = jnp.moveaxis(
            jnp.diagonal(parts[..., 1, :, :, 0, :], axis1=-4, axis2=-2), -1, -3
        )
        corner = -multiply(multiply(second, corners), first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate(
            [upper, jnp.concatenate([corner, second], axis=-1)], axis=-2
        )
    inverse = inverse[..., 0, :, :]
    return jax.lax.custom_linear_solve(
        lambda x: x + multiply(below, x),
        right,
        lambda _, b: multiply(inverse, b),
        lambda _, b: multiply(jnp.swapaxes(inverse, -1, -2), b),
    )
