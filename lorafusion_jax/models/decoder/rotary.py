"""Rotary positions, with the scalings of the frequencies for long contexts.

Axis letters: B batch, T target, H heads, K head width, R rotated pairs.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .config import Rope


class Rotation(NamedTuple):
    """Cosine and sine of the angle of every pair at every position, and the queries' factor if there is one."""

    cos: Float[Array, "B T R"]
    sin: Float[Array, "B T R"]
    queries: Float[Array, "B T"] | None = None


def rotation(
    rope: Rope, positions: Int[Array, "B T"], lengths: Int[Array, "B #T"]
) -> Rotation:
    """Return the angles of positions, from 0 on, in float32; `dynamic` and `longrope` depend on the rows' `lengths`."""
    angles = positions.astype(jnp.float32)[:, :, None] * _frequencies(rope, lengths)
    grown = None
    if rope.query_growth:
        grown = 1 + rope.query_growth * jnp.log1p(
            (positions // rope.context).astype(jnp.float32)
        )
    return Rotation(rope.scale * jnp.cos(angles), rope.scale * jnp.sin(angles), grown)


def rotate(x: Float[Array, "B T H K"], by: Rotation) -> Float[Array, "B T H K"]:
    """Rotate the first numbers of each head, each paired with the one half the rotated width further."""
    half = by.cos.shape[-1]
    cos = by.cos.astype(x.dtype)[:, :, None, :]
    sin = by.sin.astype(x.dtype)[:, :, None, :]
    first = x[..., :half]
    second = x[..., half : 2 * half]
    rest = x[..., 2 * half :]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin, rest], axis=-1
    )


def _frequencies(rope: Rope, lengths: Int[Array, "B T"]) -> Float[Array, "#B #T R"]:
    """Return the frequency of every pair; with the scalings `dynamic` and `longrope` they differ by row."""
    exponents = np.arange(0, rope.width, 2, dtype=np.float32) / np.float32(rope.width)
    if rope.scaling == "dynamic":
        longest = jnp.maximum(lengths, rope.context).astype(jnp.float32)
        stretch = rope.factor * longest / rope.context - (rope.factor - 1)
        theta = rope.theta * stretch ** (rope.width / (rope.width - 2))
        return 1.0 / theta[:, :, None] ** exponents[None, None, :]
    frequencies = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if rope.scaling == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    if rope.scaling in ("llama3", "yarn"):
        unscaled_share = _kept(rope, frequencies)
        frequencies = (
            (1 - unscaled_share) / rope.factor + unscaled_share
        ) * frequencies
    if rope.scaling == "longrope":
        long = jnp.asarray(frequencies / np.array(rope.long, np.float32))[None, None]
        short = jnp.asarray(frequencies / np.array(rope.short, np.float32))[None, None]
        return jnp.where((lengths > rope.context)[:, :, None], long, short)
    if rope.scaling == "proportional":
        turned = int(rope.share * rope.width // 2)
        frequencies = frequencies / np.float32(rope.factor)
        frequencies = np.where(np.arange(len(exponents)) < turned, frequencies, 0)
    if rope.scaling == "none":
        frequencies = 0 * frequencies
    return jnp.asarray(frequencies, jnp.float32)[None, None]


def _kept(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Return the share of every pair's unstretched frequency, which falls from 1 to 0 between two bounds."""
    if rope.scaling == "llama3":
        # It is linear in the number of turns in a context.
        turns = rope.context * frequencies / np.float32(2 * np.pi)
        return np.clip((turns - rope.low_freq) / (rope.high_freq - rope.low_freq), 0, 1)
    # It is linear in the pair's number, between the pairs that turn so often in a context.
    bounds = np.array([rope.high_freq, rope.low_freq])
    first, last = (
        rope.width
        * np.log(rope.context / (2 * np.pi * bounds))
        / (2 * np.log(rope.theta))
    )
    if rope.whole_pairs:
        first = np.floor(first)
        last = np.ceil(last)
    first = max(first, 0)
    last = min(last, rope.width - 1)
    return 1 - np.clip(
        (np.arange(len(frequencies)) - first) / max(last - first, 0.001), 0, 1
    )
