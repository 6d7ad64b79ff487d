"""T5 attention: unscaled products, relative position bias, key and value caches.

Axis letters: B batch, T target, S source, H heads, K head width, D model width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...platform import for_cpu
from ..layers import Adapters, Base, Linear, widened
from ..weights import heads_matmul
from .config import T5Config


class Attention(nnx.Module):
    """One attention layer: queries are computed from `x`, keys and values of any text by `keys_values`."""

    def __init__(self, name: str, layers: int, config: T5Config, *, rngs: nnx.Rngs):
        self.heads = config.num_heads
        d_model, inner = config.d_model, config.num_heads * config.d_kv
        # T5's own initialisation: the query's initial values include the factor 1 / sqrt(d_kv) that attention omits.
        self.q = Linear(f"{name}.q", layers, d_model, inner, scale=(d_model * config.d_kv) ** -0.5, rngs=rngs)
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
        weights = _softmax(heads_matmul(queries, keys), mask, bias).astype(x.dtype)
        mixed = heads_matmul(weights, values).transpose(0, 2, 1, 3).astype(x.dtype)
        return self.o(mixed.reshape(*x.shape[:2], -1), adapters)

    def cached(self, x: Float[Array, "B S D"], adapters: Adapters) -> tuple[Array, Array]:
        """Return keys and values of `x` in the layouts of a cache, which `attend_once` reads.

        The layouts are those of `keys_values` where heads are apart, else [B, S, H K]: an accelerator's tiles would pad
        single heads and few positions to several times their size.
        """
        if heads_apart():
            return self.keys_values(x, adapters)
        return self.k(x, adapters), self.v(x, adapters)

    def attend_once(
        self,
        x: Float[Array, "B 1 D"],
        keys: Array,
        values: Array,
        mask: Bool[Array, "#B 1 1 S"],
        bias: Float[Array, "1 H 1 S"] | None,
        adapters: Adapters,
    ) -> Float[Array, "B 1 D"]:
        """Attend from one position to the keys and values of a cache."""
        if heads_apart():
            return self(x, keys, values, mask, bias, adapters)
        queries = self.q(x, adapters)
        # Matrix units take a row for each head, zero outside the head's own columns: zeros add nothing to a sum.
        own = jnp.repeat(jnp.eye(self.heads, dtype=bool), queries.shape[-1] // self.heads, axis=1)
        scores = jnp.einsum("bhi,bsi->bhs", jnp.where(own, queries, 0), keys)
        weights = _softmax(scores[:, :, None], mask, bias)[:, :, 0].astype(x.dtype)
        mixed = jnp.einsum("bhs,bsi->bhi", weights, values)
        return self.o(jnp.sum(jnp.where(own, mixed, 0), axis=1, keepdims=True), adapters)

    def _split(self, x: Float[Array, "B T HK"]) -> Float[Array, "B T H K"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


def heads_apart() -> bool:
    """Return whether a cache keeps heads apart: a CPU multiplies each alone, and a mesh may divide them."""
    return for_cpu() or jax.sharding.get_abstract_mesh().shape.get("model", 1) > 1


def positions_of_cache() -> tuple[int, int]:
    """Return the axes of positions in keys and in values of a cache, counted from the last."""
    return (-1, -2) if heads_apart() else (-2, -2)


def _softmax(
    scores: Float[Array, "B H T S"], mask: Bool[Array, "#B 1 #T S"], bias: Float[Array, "1 H T S"] | None
) -> Float[Array, "B H T S"]:
    """Return attention weights in float32 or wider."""
    exact = widened(scores)
    if bias is not None:
        exact = exact + bias.astype(exact.dtype)
    exact = jnp.where(mask, exact, jnp.finfo(exact.dtype).min)
    return jax.nn.softmax(exact, axis=-1)


class RelativeBias(nnx.Module):
    """T5's learned bias by bucketed distance; one table per stack, shared by its layers."""

    def __init__(self, config: T5Config, *, bidirectional: bool, rngs: nnx.Rngs):
        self.max_distance, self.bidirectional = config.max_distance, bidirectional
        self.table = Base(config.d_model**-0.5 * rngs.params.normal((config.buckets, config.num_heads)))

    def __call__(self, query_positions: Int[Array, " T"], key_positions: Int[Array, " S"]) -> Float[Array, "1 H T S"]:
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
