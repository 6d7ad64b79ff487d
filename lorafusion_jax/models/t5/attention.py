"""T5 attention: unscaled products, relative position bias, key and value caches.

Axis letters: B batch, T target, S source, H heads, K head width, D model width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...support.platform import for_cpu
from ..layers import Adapters, Base, Line, Linear, apart, together, widened
from ..weights import heads_matmul
from .config import T5Config


class Attention(nnx.Module):
    """One attention layer: queries are computed from `x`, keys and values from any text or its cache."""

    def __init__(self, name: str, layers: int, config: T5Config, *, rngs: nnx.Rngs):
        self.heads = config.num_heads
        d_model = config.d_model
        inner = config.num_heads * config.d_kv
        # T5's own initialisation: the query's initial values include the factor 1 / sqrt(d_kv) that attention omits.
        self.q = Linear(
            f"{name}.q",
            layers,
            d_model,
            inner,
            scale=(d_model * config.d_kv) ** -0.5,
            rngs=rngs,
        )
        self.k = Linear(
            f"{name}.k", layers, d_model, inner, scale=d_model**-0.5, rngs=rngs
        )
        self.v = Linear(
            f"{name}.v", layers, d_model, inner, scale=d_model**-0.5, rngs=rngs
        )
        self.o = Linear(
            f"{name}.o", layers, inner, d_model, scale=inner**-0.5, rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "_ S D"],
        masks: Sequence[Bool[Array, "_ 1 _ _"]],
        bias: Float[Array, "1 H _ _"] | None,
        adapters: Adapters,
        line: Line | None,
        source_line: Line | None,
    ) -> Float[Array, "B T D"]:
        """Attend from the rows of `x` to those of `source`, group by group of the lines, where its mask holds.

        Rows have the `bias` of their first positions. Softmax is in float32.
        """
        all_queries = apart(self.q(x, adapters), line)
        all_keys = apart(self.k(source, adapters), source_line)
        all_values = apart(self.v(source, adapters), source_line)
        mixed = [
            self._mix(queries, *self._layouts(keys, values), mask, bias)
            for queries, keys, values, mask in zip(
                all_queries, all_keys, all_values, masks, strict=True
            )
        ]
        return self.o(together(mixed, line, x.shape), adapters)

    def cached(
        self, x: Float[Array, "B S D"], adapters: Adapters
    ) -> tuple[Array, Array]:
        """Return keys and values of `x` in the layouts of a cache, which `attend_once` reads.

        The layouts are those of `_layouts` where heads are apart, else [B, S, H K]: an accelerator's tiles would pad
        single heads and few positions to several times their size.
        """
        keys = self.k(x, adapters)
        values = self.v(x, adapters)
        return self._layouts(keys, values) if heads_apart() else (keys, values)

    def attend_once(
        self,
        x: Float[Array, "B 1 D"],
        keys: Array,
        values: Array,
        mask: Bool[Array, "#B 1 1 S"],
        bias: Float[Array, "1 H 1 S"] | None,
        adapters: Adapters,
    ) -> Float[Array, "B 1 D"]:
        """Attend from one position to the keys and values of a cache, in the layouts of `cached`."""
        if heads_apart():
            return self.o(
                self._mix(self.q(x, adapters), keys, values, mask, bias), adapters
            )
        queries = self.q(x, adapters)
        # Matrix units take a row for each head, zero outside the head's own columns: zeros add nothing to a sum.
        head_columns = jnp.repeat(
            jnp.eye(self.heads, dtype=bool), queries.shape[-1] // self.heads, axis=1
        )
        scores = jnp.einsum("bhi,bsi->bhs", jnp.where(head_columns, queries, 0), keys)
        weights = _softmax(scores[:, :, None], mask, bias)[:, :, 0].astype(x.dtype)
        mixed = jnp.einsum("bhs,bsi->bhi", weights, values)
        return self.o(
            jnp.sum(jnp.where(head_columns, mixed, 0), axis=1, keepdims=True), adapters
        )

    def _layouts(
        self, keys: Float[Array, "B S HK"], values: Float[Array, "B S HK"]
    ) -> tuple[Float[Array, "B H K S"], Float[Array, "B H S K"]]:
        """Return keys and values in the layouts that the two products need."""
        return self._split(keys).transpose(0, 2, 3, 1), self._split(values).transpose(
            0, 2, 1, 3
        )

    def _mix(
        self,
        queries: Float[Array, "B T HK"],
        keys: Float[Array, "B H K S"],
        values: Float[Array, "B H S K"],
        mask: Bool[Array, "#B 1 #T S"],
        bias: Float[Array, "1 H _ _"] | None,
    ) -> Float[Array, "B T HK"]:
        scores = heads_matmul(self._split(queries).transpose(0, 2, 1, 3), keys)
        bias = (
            None if bias is None else bias[..., : scores.shape[-2], : scores.shape[-1]]
        )
        weights = _softmax(scores, mask, bias).astype(queries.dtype)
        mixed = (
            heads_matmul(weights, values).transpose(0, 2, 1, 3).astype(queries.dtype)
        )
        return mixed.reshape(queries.shape)

    def _split(self, x: Float[Array, "B T HK"]) -> Float[Array, "B T H K"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


def heads_apart() -> bool:
    """Return whether a cache keeps heads apart: a CPU multiplies each alone, and a mesh may divide them."""
    return for_cpu() or jax.sharding.get_abstract_mesh().shape.get("model", 1) > 1


def positions_of_cache() -> tuple[int, int]:
    """Return the axes of positions in keys and in values of a cache, counted from the last."""
    return (-1, -2) if heads_apart() else (-2, -2)


def _softmax(
    scores: Float[Array, "B H T S"],
    mask: Bool[Array, "#B 1 #T S"],
    bias: Float[Array, "1 H T S"] | None,
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
        self.max_distance = config.max_distance
        self.bidirectional = bidirectional
        self.table = Base(
            config.d_model**-0.5
            * rngs.params.normal((config.buckets, config.num_heads))
        )

    def __call__(
        self, query_positions: Int[Array, " T"], key_positions: Int[Array, " S"]
    ) -> Float[Array, "1 H T S"]:
        table = self.table[...]
        distance = key_positions[None, :] - query_positions[:, None]
        buckets = _bucket(
            distance,
            table.shape[0],
            self.max_distance,
            bidirectional=self.bidirectional,
        )
        return jnp.take(table, buckets, axis=0).transpose(2, 0, 1)[None]


def _bucket(
    distance: Int[Array, "T S"], buckets: int, max_distance: int, *, bidirectional: bool
) -> Int[Array, "T S"]:
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
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / jnp.log(
        jnp.float32(max_distance / exact)
    )
    far = jnp.minimum(
        exact + (ratio * (buckets - exact)).astype(distance.dtype), buckets - 1
    )
    return offset + jnp.where(distance < exact, distance, far)
