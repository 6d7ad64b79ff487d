"""A decoder-only model as a Flax NNX module whose blocks are stacked and scanned.

Prompts are padded on the left inside the model, so that every row's answer begins at the same column. Positions are
counted from each row's first real token, so that results do not depend on the padding.

Axis letters: B batch, S source, T target, C columns of the cache, L layer, H heads of keys and values, G heads of
queries for each of them, K head width, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Shaped

from ...support.platform import for_cpu
from ..architecture import HEAD, Architecture, adapted_head
from ..bit_cast import pack, unpack
from ..layers import (
    Adapters,
    Base,
    Hidden,
    LayerNorm,
    Line,
    Linear,
    Logits,
    Mask,
    RMSNorm,
    Rows,
    Source,
    Target,
    apart,
    folded,
    line_of,
    of_stack,
    scan_blocks,
    together,
    unscaled_norm,
    widened,
)
from ..weights import SUM, embed, heads_matmul, matmul, unembed
from .config import DecoderConfig
from .rotary import Rotation, rotate, rotation

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class KeysValues(NamedTuple):
    """Keys and values of the prompt's columns and of those after it, some of them still to come."""

    keys: Float[Array, "*L B H K C"]
    values: Float[Array, "*L B H C K"]


class Cache(NamedTuple):
    """Keys and values for each attention of the module that is stacked, most often one.

    `states` are those of blocks that have a state instead, [L, B, ...].
    """

    attentions: tuple[KeysValues, ...]
    states: Any = None


class Context(NamedTuple):
    """Values that all layers of one kind share: each token's rotation, and the columns that it may attend to.

    `real` are the tokens that are no padding, for layers that need it. `shared` are the keys and values for layers that
    compute none.
    """

    rotation: Rotation
    mask: Bool[Array, "B T C"]
    real: Bool[Array, "B T"] | None = None
    shared: KeysValues | None = None


class Contexts(NamedTuple):
    """The position of each token, whether it is no padding, and the contexts of layers without and with a window."""

    positions: Int[Array, "B T"]
    real: Bool[Array, "B T"]
    everywhere: Context
    nearby: Context


Into = Callable[[KeysValues, int], KeysValues]


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    o_proj: Linear

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        for name, shape in config.maps["self_attn"].items():
            setattr(self, name, linear_map(config, f"self_attn.{name}", shape, rngs))
        if config.qk_norm:
            q_heads = config.num_heads if config.qk_norm == "all" else 1
            k_heads = config.num_kv_heads if config.qk_norm == "all" else 1
            layers = config.num_layers
            self.q_norm = _norm(config, layers, q_heads * config.d_head)
            if "k_proj" not in config.absent:
                self.k_norm = _norm(config, layers, k_heads * config.d_head)

    def __call__(
        self,
        x: Hidden,
        contexts: Sequence[Context],
        adapters: Adapters,
        line: Line | None,
        into: Into,
    ) -> tuple[Hidden, list[KeysValues]]:
        """Attend within the rows of `x`, group by group of the line; also return their keys and values.

        `into` puts new keys and values among those to attend to, given the number of the attention.
        """
        c = self.config
        maps = [name for name in c.maps["self_attn"] if name != "o_proj"]
        parts = [getattr(self, name)(x, adapters) for name in maps]
        if "qkv_proj" in c.fused:
            parts = self._split(parts[0])
        gate = None
        if c.attention_gate:
            heads = parts[0].reshape(*x.shape[:2], -1, 2, c.d_head)
            parts[0] = heads[:, :, :, 0].reshape(*x.shape[:2], -1)
            gate = heads[:, :, :, 1].reshape(*x.shape[:2], -1)
        if c.qk_norm == "all":
            parts[:2] = self.q_norm(parts[0]), self.k_norm(parts[1])
        mixed = []
        caches = []
        for heads, context in zip(
            zip(*(apart(part, line) for part in parts), strict=True),
            contexts,
            strict=True,
        ):
            queries, *rest = (
                part.reshape(*part.shape[:2], -1, c.d_head) for part in heads
            )
            queries = self._rotated(queries, "q_norm", context)
            if context.rotation.queries is not None:
                queries = queries * context.rotation.queries[:, :, None, None].astype(
                    queries.dtype
                )
            if rest:
                keys = self._rotated(rest[0], "k_norm", context)
                values = rest[-1]
                if c.value_norm:
                    values = unscaled_norm(values, c.eps).astype(values.dtype)
                cache = into(
                    KeysValues(
                        keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
                    ),
                    0,
                )
            else:
                assert context.shared is not None
                cache = context.shared
            caches.append(cache)
            mixed.append(self._mix(queries, cache, context.mask))
        heard = together(mixed, line, x.shape)
        return self.o_proj(
            heard if gate is None else heard * jax.nn.sigmoid(gate), adapters
        ), caches

    def _rotated(
        self, heads: Float[Array, "B T H K"], norm: str, context: Context
    ) -> Float[Array, "B T H K"]:
        """Return queries or keys, rotated and normalised, in the order that the family has."""
        if self.config.qk_norm == "head":
            heads = getattr(self, norm)(heads)
        heads = rotate(heads, context.rotation)
        if self.config.qk_norm == "rotated":
            heads = getattr(self, norm)(heads)
        return heads

    def _split(self, fused: Float[Array, "B T _"]) -> list[Float[Array, "B T _"]]:
        """Return the queries, keys and values that one matrix makes."""
        c = self.config
        groups = c.num_kv_heads if c.fused_by_head else 1
        queries = c.num_heads // groups
        keys = c.num_kv_heads // groups
        heads = fused.reshape(*fused.shape[:2], groups, -1, c.d_head)
        parts = jnp.split(heads, [queries, queries + keys], axis=3)
        return [part.reshape(*fused.shape[:2], -1) for part in parts]

    def _mix(
        self,
        queries: Float[Array, "B T HG K"],
        cache: KeysValues,
        mask: Bool[Array, "B T C"],
    ) -> Float[Array, "B T HGK"]:
        c = self.config
        batch, length = queries.shape[:2]
        if length > 1 and not c.attention_cap and not for_cpu():
            # For long sequences: it takes half of a TPU's cycles and of the memory for scores.
            keys = cache.keys.transpose(0, 3, 1, 2)
            values = cache.values.transpose(0, 2, 1, 3)
            mixed = jax.nn.dot_product_attention(
                queries, keys, values, mask=mask[:, None], scale=c.query_scale
            )
            return mixed.reshape(batch, length, -1)
        # Head g of group h is head h G + g; the heads of a group share one product.
        grouped = queries.reshape(
            batch, length, c.num_kv_heads, -1, c.d_head
        ).transpose(0, 2, 3, 1, 4)
        flat = grouped.reshape(batch, c.num_kv_heads, -1, c.d_head)
        scores = widened(heads_matmul(flat, cache.keys)) * c.query_scale
        if c.attention_cap:
            scores = c.attention_cap * jnp.tanh(scores / c.attention_cap)
        scores = scores.reshape(*grouped.shape[:4], -1)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = (
            jax.nn.softmax(scores, axis=-1)
            .astype(queries.dtype)
            .reshape(*flat.shape[:3], -1)
        )
        mixed = (
            heads_matmul(weights, cache.values)
            .reshape(grouped.shape)
            .astype(queries.dtype)
        )
        return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)


class MLP(nnx.Module):
    """The feed-forward layer: `down(act(gate x) * up x)`, or without a gate `down(act(up x))`."""

    gate_up_proj: Linear
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        for name, shape in config.maps["mlp"].items():
            setattr(self, name, linear_map(config, f"mlp.{name}", shape, rngs))

    def __call__(self, x: Hidden, adapters: Adapters) -> Hidden:
        if "gate_up_proj" in self.config.fused:
            gate, up = jnp.split(self.gate_up_proj(x, adapters), 2, axis=-1)
        else:
            up = self.up_proj(x, adapters)
            gate = self.gate_proj(x, adapters) if self.config.gated else up
        activated = ACTIVATIONS[self.config.activation](widened(gate)).astype(x.dtype)
        return self.down_proj(
            activated * up if self.config.gated else activated, adapters
        )


class Block(nnx.Module):
    """Attention and feed-forward, weights stacked over layers."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config

        def norm(place: int) -> RMSNorm | None:
            shape = config.num_layers, config.d_model
            return _norm(config, *shape) if config.norms[place] else None

        self.input_norm = norm(0)
        self.attention_post_norm = norm(1)
        self.mlp_norm = norm(2)
        self.mlp_post_norm = norm(3)
        self.self_attn = SelfAttention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Hidden,
        contexts: Sequence[Context],
        adapters: Adapters,
        line: Line | None = None,
        into: Into = lambda new, _: new,
    ) -> tuple[Hidden, list[Cache]]:
        """Run one layer; see `SelfAttention`. The caches are those of the groups of rows."""
        scale = self.config.residual_scale
        normed = _normed(x, self.input_norm)
        heard, caches = self.self_attn(normed, contexts, adapters, line, into)
        heard = _normed(heard, self.attention_post_norm)
        summed = checkpoint_name(x + _scaled(heard, scale), SUM)
        if not self.config.parallel:
            normed = _normed(summed, self.mlp_norm)
        elif self.mlp_norm is not None:
            normed = self.mlp_norm(x)
        made = self.mlp(normed, adapters)
        x = summed + _scaled(_normed(made, self.mlp_post_norm), scale)
        return x, [Cache((cache,)) for cache in caches]


class Decoder(nnx.Module):
    """A decoder-only model with random weights."""

    prefix: ClassVar[str] = (
        ""  # of a site's name; both together are the path of its linear map in the model
    )

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config: Architecture = config
        self.embedding = Base(
            0.02 * rngs.params.normal((config.vocab_size, config.d_model))
        )
        self.decoder: Any = self._blocks(config, rngs)
        if config.learned_positions:
            self.positions = Base(
                0.02 * rngs.params.normal((config.context, config.d_model))
            )
        self.norm = _norm(config, config.d_model)
        if not config.tied:
            self.head = Base(
                config.d_model**-0.5
                * rngs.params.normal((config.d_model, config.vocab_size))
            )
        if "lm_head" in config.biased:
            self.head_bias = Base(jnp.zeros(config.vocab_size))

    def __call__(
        self, ids: Target, mask: Bool[Array, "B T"], adapters: Adapters | None = None
    ) -> Logits:
        """Return the logits that follow every token, padded on either side; those of padding have no meaning."""
        return self._logits(
            self._run(ids, [self._of_rows(mask)], adapters or {})[0], adapters or {}
        )

    def _blocks(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        """Return the module that is stacked and scanned."""
        return Block(config, rngs=rngs)

    @property
    def structure(self) -> DecoderConfig:
        assert isinstance(self.config, DecoderConfig)
        return self.config

    def variables(self) -> dict[str, Base]:
        kernels = {
            site: attrgetter(f"{self.prefix}{site}.kernel")(self)
            for site in self.config.sites
        }
        return kernels if self.config.tied else kernels | {"head": self.head}

    def label_logits(
        self,
        input_ids: Source,
        input_mask: Mask,
        labels: Target,
        adapters: Adapters,
        rows: Rows | None = None,
    ) -> Logits:
        width = input_ids.shape[1]
        if rows is not None:
            sources, targets, before = rows
            ids = jnp.concatenate([input_ids, jnp.maximum(before, 0)], axis=1)
            # Labels lie behind the source, in the line and in every row. A row's text is without its last token.
            targets = [
                jnp.where(group < labels.shape[1], width + group, group)
                for group in targets
            ]
            sources = [to_the_right(group, group < width) for group in sources]
            line = line_of(
                [
                    jnp.concatenate(parts, axis=1)
                    for parts in zip(sources, targets, strict=True)
                ],
                ids.shape[1],
            )
            contexts = [
                self._of_rows(mask, jnp.sum(mask, axis=1, keepdims=True) + 1)
                for mask in line.masks()
            ]
            x, _ = self._run(folded(ids), contexts, adapters, line)
            return self._logits(x.reshape(*ids.shape, -1)[:, width:], adapters)
        ids = jnp.concatenate(
            [to_the_right(input_ids, input_mask), jnp.maximum(labels[:, :-1], 0)],
            axis=1,
        )
        mask = jnp.concatenate(
            [to_the_right(input_mask, input_mask), labels[:, :-1] >= 0], axis=1
        )
        # The last label counts, as in transformers' loss, whether or not the width of the batch lets it be an input.
        lengths = jnp.sum(input_mask, axis=1, keepdims=True) + jnp.sum(
            labels >= 0, axis=1, keepdims=True
        )
        x, _ = self._run(ids, [self._of_rows(mask, lengths)], adapters)
        return self._logits(x[:, width - 1 :], adapters)

    def prompt(
        self, input_ids: Source, input_mask: Mask, length: int, adapters: Adapters
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Return the logits that follow the prompt, and a cache with room for all but the last of `length` tokens."""
        ids = to_the_right(input_ids, input_mask)
        mask = to_the_right(input_mask, input_mask)
        x, (cache,) = self._run(ids, [self._of_rows(mask)], adapters)
        room = [(0, 0)] * 4 + [(0, length - 1)]
        attentions = tuple(
            KeysValues(
                pack(jnp.pad(attention.keys, room)),
                pack(jnp.pad(attention.values, [*room[:3], room[4], (0, 0)])),
            )
            for attention in cache.attentions
        )
        logits = self._logits(x[:, -1:], adapters)[:, 0]
        return logits, cache._replace(attentions=attentions)

    def decode_token(
        self,
        token: Int[Array, " B"],
        step: Int[Array, ""],
        cache: Cache,
        input_mask: Mask,
        adapters: Adapters,
    ) -> tuple[Float[Array, "B V"], Cache]:
        column = input_mask.shape[1] - 1 + step
        columns = jnp.arange(cache.attentions[0].keys.shape[-1])[None]
        sources = jnp.sum(input_mask, axis=1, keepdims=True, dtype=jnp.int32)
        positions = sources - 1 + step
        seen = (columns <= column) & (columns >= column - positions)
        # With longrope, keys of the cache have the frequencies of the prompt's length, and so has the whole answer.
        ropes = (self.structure.rope, self.structure.local_rope)
        longrope = any(rope and rope.scaling == "longrope" for rope in ropes)
        lengths = sources if longrope else positions + 1
        contexts = self._contexts(
            positions, lengths, seen[:, None], column[None, None], columns
        )

        def block(
            layer: Any,
            carry: tuple[Array, tuple[KeysValues, ...]],
            layer_inputs: tuple[Any, Array | None, tuple[Array, Any]],
        ) -> tuple[tuple[Array, tuple[KeysValues, ...]], Any]:
            x, attentions = carry
            adapters, local, (number, _) = layer_inputs
            updated = list(attentions)

            def into(new: KeysValues, place: int) -> KeysValues:
                # In place: a layer's copy with the new column would be copied once more, into the loop's results.
                keys = pack(new.keys)[None]
                values = pack(new.values)[None]
                stack = updated[place]
                update = jax.lax.dynamic_update_slice
                updated[place] = KeysValues(
                    update(stack.keys, keys, (number, 0, 0, 0, column)),
                    update(stack.values, values, (number, 0, 0, column, 0)),
                )
                return jax.tree.map(
                    lambda a: unpack(
                        jax.lax.dynamic_index_in_dim(a, number, keepdims=False)
                    ),
                    updated[place],
                )

            context = self._of_layer(contexts, local)
            x, (new,) = layer(x, [context], adapters, into=into)
            return (x, tuple(updated)), new.states

        numbers = jnp.arange(len(cache.attentions[0].keys)), cache.states
        ids = token[:, None]
        carry = self._embed(ids, [contexts]), cache.attentions
        (x, attentions), states = self._scan(block, carry, ids, adapters, numbers)
        return self._logits(x, adapters)[:, 0], Cache(attentions, states)

    def _run(
        self,
        ids: Target,
        contexts: Sequence[Contexts],
        adapters: Adapters,
        line: Line | None = None,
    ) -> tuple[Hidden, list[Cache]]:
        """Run all tokens at once; return the last block's outputs, and for each context the cache of all layers."""

        def block(
            layer: Any, x: Array, layer_inputs: tuple[Any, Array | None, None]
        ) -> tuple[Array, list[Cache]]:
            adapters, local, _ = layer_inputs
            of_groups = [self._of_layer(context, local) for context in contexts]
            return layer(x, of_groups, adapters, line)

        x = self._embed(ids, contexts, line)
        return self._scan(block, x, ids, adapters, None)

    def _of_rows(
        self, mask: Bool[Array, "B T"], lengths: Int[Array, "B 1"] | None = None
    ) -> Contexts:
        """Return the contexts of one row in each line, padded on either side; `lengths` may count a token more."""
        columns = jnp.arange(mask.shape[1])[None]
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        seen = mask[:, None, :] & (columns[:, None, :] <= columns[:, :, None])
        lengths = jnp.sum(mask, axis=1, keepdims=True) if lengths is None else lengths
        return self._contexts(positions, lengths, seen, columns, columns)

    def _contexts(
        self,
        positions: Int[Array, "B T"],
        lengths: Int[Array, "B #T"],
        seen: Bool[Array, "B T C"],
        places: Int[Array, "#B T"],
        columns: Int[Array, "#B C"],
    ) -> Contexts:
        """Return the contexts of rows.

        Rows have `lengths` tokens in all, for the frequencies of some scalings. The window is counted from the
        `places` of queries to the `columns` of keys.
        """
        c = self.structure
        everywhere = Context(rotation(c.rope, positions, lengths), seen)
        nearby = everywhere
        if any(c.sliding):
            near = seen
            if c.window:
                near = seen & (columns[:, None, :] > places[:, :, None] - c.window)
            rope = c.local_rope or c.rope
            nearby = Context(rotation(rope, positions, lengths), near)
        # A real token attends to itself.
        real = jnp.any(seen & (columns[:, None, :] == places[:, :, None]), axis=-1)
        return Contexts(positions, real, everywhere, nearby)

    def _of_layer(self, contexts: Contexts, local: Bool[Array, ""] | None) -> Any:
        """Return the context of a layer, given whether it has a window; None if all layers are of one kind."""
        if local is None:
            sliding = any(self.structure.sliding)
            return contexts.nearby if sliding else contexts.everywhere
        return jax.tree.map(
            lambda a, b: jnp.where(local, a, b), contexts.nearby, contexts.everywhere
        )

    def _embed(
        self, ids: Target, contexts: Sequence[Contexts], line: Line | None = None
    ) -> Hidden:
        x = embed(self.embedding.get_value(), ids).astype(self.config.dtype)
        if self.structure.learned_positions:
            table = self.positions.get_value()
            placed = [embed(table, group.positions) for group in contexts]
            x = x + together(placed, line, ids.shape).astype(x.dtype)
        scale = self.structure.embedding_scale
        # Hugging Face rounds the factor to the dtype of the activations, which matters in bfloat16.
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

    def _logits(self, x: Hidden, adapters: Adapters) -> Logits:
        x = self.norm(x)
        cap = self.structure.logit_cap
        if HEAD in adapters:
            logits = adapted_head(self, x, adapters)
        elif self.config.tied:
            logits = unembed(x, self.embedding.get_value())
        else:
            logits = matmul(x, self.head.get_value())
        if "lm_head" in self.structure.biased:
            logits = logits + self.head_bias[...][None, None].astype(logits.dtype)
        logits = _scaled(logits, self.structure.logit_scale)
        return cap * jnp.tanh(logits / cap) if cap else logits

    def _scan(
        self,
        block: Callable[..., tuple[Any, Any]],
        carry: Any,
        ids: Target,
        adapters: Adapters,
        numbers: Any,
    ) -> tuple[Any, Any]:
        """Call `block` for one layer after the other; `carry` begins with the embeddings of `ids`."""
        sliding = self.structure.sliding
        local = jnp.array(sliding) if any(sliding) and not all(sliding) else None
        xs = (of_stack(adapters, "decoder", self.config.adaptable), local, numbers)
        return scan_blocks(block, self.decoder, carry, xs, unroll=self.config.unroll)


def to_the_right(
    a: Shaped[Array, "B S"], mask: Bool[Array, "B S"]
) -> Shaped[Array, "B S"]:
    """Move what `mask` keeps of every row to the row's right end, in its order."""
    order = jnp.argsort(mask, axis=1, stable=True)
    return jnp.take_along_axis(a, order, axis=1)


def _normed(x: Hidden, norm: RMSNorm | None) -> Hidden:
    return x if norm is None else norm(x)


def _scaled(x: Float[Array, "*B"], by: float) -> Float[Array, "*B"]:
    return x if by == 1 else (by * widened(x)).astype(x.dtype)


def linear_map(
    config: DecoderConfig, place: str, shape: tuple[int, int], rngs: nnx.Rngs
) -> Linear:
    """Return a linear map at a place in blocks, such as `mlp.down_proj`."""
    return Linear(
        place,
        config.num_layers,
        *shape,
        scale=shape[0] ** -0.5,
        biased=place.rpartition(".")[2] in config.biased,
        rngs=rngs,
    )


def _norm(config: DecoderConfig, *shape: int) -> RMSNorm:
    if config.norm == "layer":
        return LayerNorm(shape, config.eps)
    return RMSNorm(shape, config.eps, offset=config.norm_offset)
