"""Greedy generation: read the source once, then one token at a time until all rows end."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from .architecture import Model
from .layers import Adapters
from .weights import reads

# position, last token [B], done [B], tokens so far [B, max_new_tokens], cache
_State = tuple[Array, Array, Array, Array, Any]


def generate(
    model: Model,
    input_ids: Int[Array, "B S"],
    input_mask: Bool[Array, "B S"],
    adapters: Adapters | None = None,
    *,
    max_new_tokens: int,
    row_mask: Bool[Array, " B"] | None = None,
) -> Int[Array, "B {max_new_tokens}"]:
    """Return the most likely next tokens of each row, chosen greedily; after its end token a row holds padding.

    The function is pure: `jax.jit` it with the model's state as an argument, and `jax.vmap` it over adapters.

    Args:
      model: the base model.
      input_ids: source tokens.
      input_mask: True where a source token is real.
      adapters: site -> adapter, leaves with a leading layer axis.
      max_new_tokens: limit of the loop, which stops earlier once every row has ended.
      row_mask: False for rows that only pad the batch; generation does not wait for their end.
    """
    adapters = adapters or {}
    config = model.config
    batch = input_ids.shape[0]
    ends = jnp.array(config.end_ids, jnp.int32)
    graph, weights = nnx.split(model)

    def at(number: Array | int) -> tuple[Model, Adapters]:
        """Return model and adapters with the read noise of one token; number 0 is the source."""
        read, adapted = reads((weights, adapters), number)
        return nnx.merge(graph, read), adapted

    source_model, source_adapters = at(0)
    first, cache = source_model.prompt(input_ids, input_mask, max_new_tokens, source_adapters)
    done = jnp.zeros(batch, bool) if row_mask is None else ~row_mask
    tokens = jnp.full((batch, max_new_tokens), config.pad_id, jnp.int32)

    def running(state: _State) -> Array:
        position, _, done, _, _ = state
        return (position < max_new_tokens) & ~jnp.all(done)

    def step(state: _State) -> _State:
        position, token, done, tokens, cache = state
        token_model, token_adapters = at(position + 1)
        logits, cache = token_model.decode_token(token, position, cache, input_mask, token_adapters)
        token = jnp.where(done, config.pad_id, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1)
        return position + 1, token, done | jnp.isin(token, ends), tokens, cache

    state = (jnp.int32(0), first, done, tokens, cache)
    return jax.lax.while_loop(running, step, state)[3]
