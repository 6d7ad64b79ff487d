"""The gated delta rule: a memory that every token lets fade, and corrects at its key.

    memory <- exp(decay) memory;  memory <- memory + beta key (value - key memory);  output = query memory / sqrt(K)

Tokens are computed in chunks. Within one, the corrections solve a triangular system of equations, so that only chunks
follow each other. Source: Yang et al., "Gated Delta Networks" (2024), and transformers.

Axis letters: B batch, T target, G heads of keys, H heads of values, K key width, V value width, N chunks, C
tokens of a chunk.
"""

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
    chunk = min(length, CHUNK)

    def normalised(a: Array) -> Array:
        a = a * jax.lax.rsqrt(jnp.sum(jnp.square(a), axis=-1, keepdims=True) + _EPS)
        return jnp.repeat(a, values.shape[2] // a.shape[2], axis=2)

    def in_chunks(a: Array) -> Array:
        """Return [B, T, H, ...] as [N, B, H, C, ...], filled up with zeros."""
        a = jnp.pad(a, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), (1, 3), (0, 2))

    queries = normalised(queries) * queries.shape[-1] ** -0.5
    q, k, v, g, b = map(in_chunks, (queries, normalised(keys), values, decay, beta))
    faded = jnp.cumsum(g, axis=-1)  # since the chunk began
    causal = jnp.tril(jnp.ones((1, 1, 1, chunk, chunk), bool))
    between = jnp.exp(jnp.where(causal, faded[..., :, None] - faded[..., None, :], -jnp.inf))
    written = k * b[..., None]
    overlap = (written @ jnp.swapaxes(k, -1, -2)) * between
    scores = (q @ jnp.swapaxes(k, -1, -2)) * between
    since = jnp.exp(faded)[..., None]
    unsolved = jnp.concatenate([v * b[..., None], written * since], axis=-1)
    solved = jax.lax.linalg.triangular_solve(overlap, unsolved, left_side=True, lower=True, unit_diagonal=True)
    until = jnp.exp(faded[..., -1:] - faded)[..., None]

    def step(memory: Array, of_chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        new, read, scores, q, k, kept = of_chunk
        corrections = new - read @ memory
        outputs = q @ memory + scores @ corrections
        return memory * kept + jnp.swapaxes(k, -1, -2) @ corrections, outputs

    new, read = jnp.split(solved, [values.shape[-1]], axis=-1)
    memory, outputs = jax.lax.scan(step, memory, (new, read, scores, q * since, k * until, since[..., -1:, :]))
    outputs = jnp.moveaxis(outputs, (0, 2), (1, 3))
    return outputs.reshape(outputs.shape[0], -1, *outputs.shape[3:])[:, :length], memory
