"""T5 attention: unscaled products, relative position bias, key and value caches.

Axis letters: B batch, T target, S source, H heads, K head width, D model width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..layers import Adapters, Base, Linear


class Attention(nnx.Module):
    """One attention layer.

    Queries are computed from `x`; keys and values come from `keys_values`. So self-attention, cross-attention and
    both with a cache are the same call.
    """

    def __init__(self, name: str, d_model: int, heads: int, d_kv: int, *, layers: int, rngs: nnx.Rngs):
        self.heads = heads
        inner = heads * d_kv
        # T5's own initialisation: the query's initial values include the factor 1 / sqrt(d_kv) that attention omits.
        self.q = Linear(f"{name}.q", layers, d_model, inner, scale=(d_model * d_kv) ** -0.5, rngs=rngs)
        self.k = Linear(f"{name}.k", layers, d_model, inner, scale=d_model**-0.5, rngs=rngs)
        self.v = Linear(f"{name}.v", layers, d_model, inner, scale=d_model**-0.5, rngs=rngs)
        self.o = Linear(f"{name}.o", layers, inner, d_model, scale=inner**-0.5, rngs=rngs)

    def keys_values(
        self, x: Float[Array, "B S D"], adapters: Adapters
    ) -> tuple[Float[Array, "B H K S"], Float[Array, "B H S K"]]:
        """Return keys and values of `x`, in the layouts that the two products need."""
        keys = self._split(self.k(x, adapters)).transpose(0, 2, 3, 1)
        values = self._split(self.v(x, adapters)).transpose(0, 2, 1, 3)
        return keys, values

    def __call__(
        self,
        x: Float[Array, "B T D"],
        keys: Float[Array, "B H K S"],
        values: Float[Array, "B H S K"],
        mask: Bool[Array, "#B 1 #T S"],
        bias: Float[Array, "1 H T S"] | None,
        adapters: Adapters,
    ) -> Float[Array, "B T D"]:
        """Attend from `x` to keys and values where `mask` holds; softmax in float32."""
        queries = self._split(self.q(x, adapters)).transpose(0, 2, 1, 3)
        scores = jnp.matmul(queries, keys).astype(jnp.float32)
        if bias is not None:
            scores = scores + bias.astype(jnp.float32)
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.matmul(weights, values).transpose(0, 2, 1, 3)
        return self.o(mixed.reshape(*x.shape[:2], -1), adapters)

    def _split(self, x: Float[Array, "B T HK"]) -> Float[Array, "B T H K"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


class RelativeBias(nnx.Module):
    """T5's learned bias by bucketed distance; one table per stack, shared by its layers."""

    def __init__(
        self,
        buckets: int,
        heads: int,
        *,
        max_distance: int,
        bidirectional: bool,
        scale: float,
        rngs: nnx.Rngs,
    ):
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.table = Base(scale * rngs.params.normal((buckets, heads)))

    def __call__(self, query_positions: Int[Array, " T"], key_positions: Int[Array, " S"]) -> Float[Array, "1 H T S"]:
        """Return the bias of every head for keys as seen from queries."""
        table = self.table[...]
        distance = key_positions[None, :] - query_positions[:, None]
        buckets = _bucket(distance, table.shape[0], self.max_distance, bidirectional=self.bidirectional)
        return jnp.take(table, buckets, axis=0).transpose(2, 0, 1)[None]


def _bucket(distance: Int[Array, "T S"], buckets: int, max_distance: int, *, bidirectional: bool) -> Int[Array, "T S"]:
    """Bucket `key - query` distances: exact up to half the buckets, logarithmic up to `max_distance`."""
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = -jnp.minimum(distance, 0)
    exact = buckets // 2
    # float32 and this order of operations match Hugging Face's, because the bucket edges depend on the rounding.
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / jnp.log(jnp.float32(max_distance / exact))
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(distance.dtype), buckets - 1)
    return offset + jnp.where(distance < exact, distance, far)
