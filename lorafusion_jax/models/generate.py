"""Generation: read the source once, then one token at a time until all rows end.

Axis letters: B batch, S source, V vocabulary.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from ..checks import at_least
from .architecture import Model
from .layers import Adapters
from .weights import reads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Choice of the next token: the most likely one, or a draw.

    A draw divides the logits by the temperature, then filters by `top_k`, then by `top_p`, as Hugging Face does. Tokens
    that are as likely as the last one that a filter keeps are kept too, so the order of the vocabulary has no effect.

    Attributes:
      temperature: divisor of the logits in a draw; 0 takes the most likely token.
      top_k: draw from this many of the most likely tokens; by default from all.
      top_p: draw from the fewest of the most likely tokens whose probabilities add up to this or more.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature and not 1e-6 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: expected a number from 1e-6 up, or 0 for no draw")
        at_least(1, top_k=self.top_k)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected a probability above 0, up to 1")
        if not self.temperature and (self.top_k is not None or self.top_p < 1):
            raise ValueError("top_k and top_p filter a draw, and temperature 0 draws nothing: give a temperature")

    def filtered(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Return the logits of the distribution to draw from, in float32; -inf for tokens that are filtered out."""
        logits = logits.astype(jnp.float32)
        # Without the maximum a low temperature would overflow.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / self.temperature
        if self.top_k is None and self.top_p == 1:
            return scaled
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        least = ordered[:, -1:] if self.top_k is None else ordered[:, : self.top_k][:, -1:]
        if self.top_p < 1:
            likely = ordered >= least
            probabilities = jax.nn.softmax(jnp.where(likely, ordered, -jnp.inf), axis=-1)
            before = jnp.pad(jnp.cumsum(probabilities, axis=-1)[:, :-1], [(0, 0), (1, 0)])
            least = jnp.min(jnp.where(likely & (before < self.top_p), ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scaled >= least, scaled, -jnp.inf)

    def choose(
        self, logits: Float[Array, "B V"], position: Int[Array, ""], row_keys: Key[Array, " B"] | None
    ) -> Int[Array, " B"]:
        """Return the next token of every row: a draw depends on the row's key and on the position alone."""
        if not self.temperature:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if row_keys is None:
            raise ValueError("a draw needs a key for every row: give row_keys")

        def draw(key: Array, row: Array) -> Array:
            return jax.random.categorical(jax.random.fold_in(key, position), row)

        return jax.vmap(draw)(row_keys, self.filtered(logits)).astype(jnp.int32)


GREEDY = Sampling()


class Generation(NamedTuple):
    """State of a generation: number of tokens so far, the last one, rows that ended, and all tokens, then padding."""

    position: Int[Array, ""]
    token: Int[Array, " B"]
    done: Bool[Array, " B"]
    tokens: Int[Array, "B max_new_tokens"]
    cache: Any


def generate(
    model: Model,
    input_ids: Int[Array, "B S"],
    input_mask: Bool[Array, "B S"],
    adapters: Adapters | None = None,
    *,
    max_new_tokens: int,
    row_mask: Bool[Array, " B"] | None = None,
    sampling: Sampling = GREEDY,
    row_keys: Key[Array, " B"] | None = None,
    axis: str | None = None,
) -> Int[Array, "B {max_new_tokens}"]:
    """Return the next tokens of each row; after its end token a row holds padding.

    The function is pure: `jax.jit` it with the model's state as an argument, and `jax.vmap` it over adapters.

    Args:
      model: the base model.
      input_ids: source tokens.
      input_mask: True where a source token is real.
      adapters: site -> adapter, leaves with a leading layer axis.
      max_new_tokens: limit of the loop, which stops earlier once every row has ended.
      row_mask: False for rows that only pad the batch; generation does not wait for their end.
      sampling: choice of tokens, by default the most likely one. Static under `jax.jit`.
      row_keys: keys of the rows' draws; a row's draws depend on no other row.
      axis: name of a mapped axis, whose members then end together: with a position for each, every token would rewrite
        all caches under `jax.vmap`.

    Raises:
      ValueError: `max_new_tokens` is below 1; a draw without keys.
    """
    choice: dict[str, Any] = {"sampling": sampling, "row_keys": row_keys}
    begun = begin(model, input_ids, input_mask, adapters, max_new_tokens=max_new_tokens, row_mask=row_mask, **choice)

    def running(state: Generation) -> Array:
        waits = jnp.any(~state.done)
        if axis is not None:
            waits = jax.lax.pmax(waits.astype(jnp.int32), axis) > 0
        return (state.position < max_new_tokens) & waits

    def step(state: Generation) -> Generation:
        return next_token(model, state, input_mask, adapters, **choice)

    return jax.lax.while_loop(running, step, begun).tokens


def begin(
    model: Model,
    input_ids: Int[Array, "B S"],
    input_mask: Bool[Array, "B S"],
    adapters: Adapters | None = None,
    *,
    max_new_tokens: int,
    row_mask: Bool[Array, " B"] | None = None,
    sampling: Sampling = GREEDY,
    row_keys: Key[Array, " B"] | None = None,
) -> Generation:
    """Read the source, and choose a causal model's first token; the arguments are those of `generate`."""
    at_least(1, max_new_tokens=max_new_tokens)
    read_model, read_adapters = _read(model, adapters, 0)
    first, cache = read_model.prompt(input_ids, input_mask, max_new_tokens, read_adapters)
    batch, pad_id = input_ids.shape[0], model.config.pad_id
    done = jnp.zeros(batch, bool) if row_mask is None else ~row_mask
    tokens = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)
    token = jnp.full(batch, pad_id, jnp.int32) if model.config.causal else first
    state = Generation(jnp.int32(0), token, done, tokens, cache)
    return _with_token(model, state, first, sampling, row_keys) if model.config.causal else state


def next_token(
    model: Model,
    state: Generation,
    input_mask: Bool[Array, "B S"],
    adapters: Adapters | None = None,
    *,
    sampling: Sampling = GREEDY,
    row_keys: Key[Array, " B"] | None = None,
) -> Generation:
    """Return the state with one more token in every row; the arguments are those of `generate`."""
    read_model, read_adapters = _read(model, adapters, state.position + 1)
    logits, cache = read_model.decode_token(state.token, state.position, state.cache, input_mask, read_adapters)
    return _with_token(model, state._replace(cache=cache), logits, sampling, row_keys)


def _with_token(
    model: Model,
    state: Generation,
    logits: Float[Array, "B V"],
    sampling: Sampling,
    row_keys: Key[Array, " B"] | None,
) -> Generation:
    position, _, done, tokens, cache = state
    token = jnp.where(done, model.config.pad_id, sampling.choose(logits, position, row_keys))
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1)
    ends = jnp.array(model.config.end_ids, jnp.int32)
    return Generation(position + 1, token, done | jnp.isin(token, ends), tokens, cache)


def _read(model: Model, adapters: Adapters | None, number: Array | int) -> tuple[Model, Adapters]:
    """Return model and adapters with the read noise of one token; number 0 is the source."""
    graph, weights = nnx.split(model)
    read, adapted = reads((weights, adapters or {}), number)
    return nnx.merge(graph, read), adapted
