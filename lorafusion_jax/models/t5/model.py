"""T5 1.0, T5 1.1 and FLAN-T5 as a Flax NNX module whose blocks are stacked and scanned.

Axis letters: B batch, T target, S source, L layer, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ..architecture import HEAD, Architecture, adapted_head
from ..bit_cast import pack, unpack
from ..layers import (
    Adapters,
    Base,
    Hidden,
    Line,
    Linear,
    Logits,
    Mask,
    RMSNorm,
    Rows,
    Source,
    Target,
    folded,
    line_of,
    of_stack,
    scan_blocks,
    widened,
)
from ..weights import SUM, embed, matmul, unembed
from .attention import Attention, RelativeBias, positions_of_cache
from .config import T5Config

Encoded = Float[Array, "_ S D"]  # a packed source may be folded where the target is not


class Cache(NamedTuple):
    """Keys and values that the decoder's layers keep between tokens: their own so far, and those of the source.

    Their layouts are those of `Attention.cached`: on a CPU [L B H K T] and [L B H T K], else [L B T (H K)].
    """

    keys: Array
    values: Array
    cross_keys: Array
    cross_values: Array


class FeedForward(nnx.Module):
    """`wo(relu(wi x))` of T5 1.0, or `wo(gelu(wi_0 x) * wi_1 x)` of T5 1.1 and FLAN."""

    def __init__(self, layers: int, config: T5Config, *, rngs: nnx.Rngs):
        d_model = config.d_model
        d_ff = config.d_ff
        self.gated = config.gated

        def linear(name: str) -> Linear:
            return Linear(
                f"ff.{name}", layers, d_model, d_ff, scale=d_model**-0.5, rngs=rngs
            )

        if self.gated:
            self.wi_0 = linear("wi_0")
            self.wi_1 = linear("wi_1")
        else:
            self.wi = linear("wi")
        self.wo = Linear("ff.wo", layers, d_ff, d_model, scale=d_ff**-0.5, rngs=rngs)

    def __call__(self, x: Hidden, adapters: Adapters) -> Hidden:
        if self.gated:
            gate = jax.nn.gelu(
                widened(self.wi_0(x, adapters)), approximate=True
            ).astype(x.dtype)
            hidden = gate * self.wi_1(x, adapters)
        else:
            hidden = jax.nn.relu(self.wi(x, adapters))
        return self.wo(hidden, adapters)


class Block(nnx.Module):
    """Self-attention, in a decoder cross-attention, and feed-forward; weights stacked over layers."""

    def __init__(self, config: T5Config, layers: int, *, crosses: bool, rngs: nnx.Rngs):
        norm = partial(RMSNorm, (layers, config.d_model), config.eps)
        self.self_norm = norm()
        self.ff_norm = norm()
        self.self_attention = Attention("self", layers, config, rngs=rngs)
        if crosses:
            self.cross_norm = norm()
            self.cross_attention = Attention("cross", layers, config, rngs=rngs)
        self.ff = FeedForward(layers, config, rngs=rngs)

    def __call__(
        self,
        x: Hidden,
        masks: Sequence[Bool[Array, "_ 1 _ _"]],
        bias: Float[Array, "1 H _ _"],
        adapters: Adapters,
        line: Line | None,
        encoded: Encoded | None = None,
        cross_masks: Sequence[Bool[Array, "_ 1 1 _"]] = (),
        source_line: Line | None = None,
    ) -> Hidden:
        """Run one layer of the source, or of the target (teacher forcing), which attends to the encoded source."""
        normed = self.self_norm(x)
        x = checkpoint_name(
            x + self.self_attention(normed, normed, masks, bias, adapters, line, line),
            SUM,
        )
        if encoded is not None:
            normed = self.cross_norm(x)
            heard = self.cross_attention(
                normed, encoded, cross_masks, None, adapters, line, source_line
            )
            x = checkpoint_name(x + heard, SUM)
        return x + self.ff(self.ff_norm(x), adapters)

    def decode_token(
        self,
        x: Float[Array, "B 1 D"],
        into: Callable[[Array, Array], tuple[Array, Array]],
        cross: tuple[Array, Array],
        mask: Bool[Array, "1 1 1 T"],
        cross_mask: Bool[Array, "B 1 1 S"],
        bias: Float[Array, "1 H 1 T"],
        adapters: Adapters,
    ) -> Float[Array, "B 1 D"]:
        """Run one position; `into` puts its keys and values into the cache, and returns those of all positions.

        Keys and values, those of the source in `cross` too, have the layouts of `Attention.cached`.
        """
        normed = self.self_norm(x)
        keys, values = into(*self.self_attention.cached(normed, adapters))
        x = x + self.self_attention.attend_once(
            normed, keys, values, mask, bias, adapters
        )
        x = x + self.cross_attention.attend_once(
            self.cross_norm(x), *cross, cross_mask, None, adapters
        )
        return x + self.ff(self.ff_norm(x), adapters)


class T5(nnx.Module):
    """A T5 model with T5's random initialisation; `io.hf` fills it with pretrained weights."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = config
        self.config: Architecture = config
        self.scale_logits = c.scale_logits
        self.start_id = c.start_id
        self.embedding = Base(rngs.params.normal((c.vocab_size, c.d_model)))
        self.encoder_bias = RelativeBias(c, bidirectional=True, rngs=rngs)
        self.encoder = Block(c, c.num_layers, crosses=False, rngs=rngs)
        self.encoder_norm = RMSNorm((c.d_model,), c.eps)
        self.decoder_bias = RelativeBias(c, bidirectional=False, rngs=rngs)
        self.decoder = Block(c, c.num_decoder_layers, crosses=True, rngs=rngs)
        self.decoder_norm = RMSNorm((c.d_model,), c.eps)
        if not c.tied:
            self.head = Base(
                c.d_model**-0.5 * rngs.params.normal((c.d_model, c.vocab_size))
            )

    def __call__(
        self,
        input_ids: Source,
        input_mask: Mask,
        decoder_ids: Target,
        adapters: Adapters | None = None,
    ) -> Logits:
        """Return the logits of every target position (teacher forcing)."""
        encoded = self.encode(input_ids, input_mask, adapters or {})
        return self.decode(decoder_ids, encoded, input_mask, adapters or {})

    def variables(self) -> dict[str, Base]:
        modules = {"self": "self_attention", "cross": "cross_attention", "ff": "ff"}
        kernels = {}
        for site in self.config.sites:
            stack, module, name = site.split(".")
            kernels[site] = getattr(
                getattr(getattr(self, stack), modules[module]), name
            ).kernel
        return kernels if self.config.tied else kernels | {"head": self.head}

    def label_logits(
        self,
        input_ids: Source,
        input_mask: Mask,
        labels: Target,
        adapters: Adapters,
        rows: Rows | None = None,
    ) -> Logits:
        if rows is None:
            start = decoder_inputs(
                labels, start_id=self.start_id, pad_id=self.config.pad_id
            )
            return self(input_ids, input_mask, start, adapters)
        sources, targets, before = rows
        source_line = line_of(sources, input_ids.shape[1])
        line = line_of(targets, labels.shape[1])
        input_ids, input_mask, start = map(
            folded,
            (input_ids, input_mask, jnp.where(before < 0, self.start_id, before)),
        )
        encoded = self.encode(input_ids, input_mask, adapters, source_line)
        logits = self.decode(start, encoded, input_mask, adapters, line, source_line)
        return logits.reshape(*labels.shape, -1)

    def prompt(
        self, input_ids: Source, input_mask: Mask, length: int, adapters: Adapters
    ) -> tuple[Int[Array, " B"], Cache]:
        """Encode the source; return the start token and a cache for `length` target positions."""
        encoded = self.encode(input_ids, input_mask, adapters)
        start = jnp.full(input_ids.shape[0], self.start_id, jnp.int32)

        def block(
            layer: Block, x: Array, layer_inputs: tuple[Adapters, None]
        ) -> tuple[Array, tuple[Array, Array]]:
            return x, layer.cross_attention.cached(x, layer_inputs[0])

        def empty(cross_cache: Array, axis: int) -> Array:
            shape = list(cross_cache.shape)
            shape[axis] = length
            return pack(jnp.zeros(shape, encoded.dtype))

        _, cross = self._scan(block, "decoder", encoded, adapters)
        return start, Cache(*map(empty, cross, positions_of_cache()), *cross)

    def encode(
        self,
        input_ids: Source,
        input_mask: Mask,
        adapters: Adapters,
        line: Line | None = None,
    ) -> Encoded:
        """Return the encoder's output. Padding is not attended to, and its outputs have no meaning."""
        masks = _keys(input_mask, line)
        positions = jnp.arange(max(mask.shape[-1] for mask in masks))
        bias = self.encoder_bias(positions, positions)

        def block(
            layer: Block, x: Array, layer_inputs: tuple[Adapters, None]
        ) -> tuple[Array, None]:
            return layer(x, masks, bias, layer_inputs[0], line), None

        x, _ = self._scan(block, "encoder", self._embed(input_ids), adapters)
        return self.encoder_norm(x)

    def decode(
        self,
        decoder_ids: Target,
        encoded: Encoded,
        input_mask: Bool[Array, "_ S"],
        adapters: Adapters,
        line: Line | None = None,
        source_line: Line | None = None,
    ) -> Logits:
        """Return the logits of every position of `decoder_ids`, each seeing those before it."""
        if line is None:
            widths = [decoder_ids.shape[1]]
        else:
            widths = [group.shape[1] for group in line.groups]
        positions = jnp.arange(max(widths))
        bias = self.decoder_bias(positions, positions)
        seen = (positions[None, :] <= positions[:, None])[None, None]
        masks = [seen[..., :width, :width] for width in widths]
        cross_masks = _keys(input_mask, source_line)

        def block(
            layer: Block, x: Array, layer_inputs: tuple[Adapters, None]
        ) -> tuple[Array, None]:
            layer_adapters, _ = layer_inputs
            return layer(
                x, masks, bias, layer_adapters, line, encoded, cross_masks, source_line
            ), None

        x, _ = self._scan(block, "decoder", self._embed(decoder_ids), adapters)
        return self._logits(x, adapters)

    def decode_token(
        self,
        token: Int[Array, " B"],
        step: Int[Array, ""],
        cache: Cache,
        input_mask: Mask,
        adapters: Adapters,
    ) -> tuple[Float[Array, "B V"], Cache]:
        axes = positions_of_cache()
        positions = jnp.arange(cache.keys.shape[axes[0]])
        bias = self.decoder_bias(step[None], positions)
        mask = (positions <= step)[None, None, None]
        cross_mask = input_mask[:, None, None, :]

        def block(
            layer: Block,
            carry: tuple[Array, Array, Array],
            layer_inputs: tuple[Adapters, tuple[tuple[Array, Array], Array]],
        ) -> tuple[tuple[Array, Array, Array], None]:
            x, keys, values = carry
            adapters, (cross, number) = layer_inputs

            def put(cache: Array, new: Array, axis: int) -> Array:
                start = [number, *[0] * new.ndim]
                start[axis] = step
                return jax.lax.dynamic_update_slice(cache, pack(new)[None], start)

            def into(key: Array, value: Array) -> tuple[Array, Array]:
                # In place: a layer's copy with the new column would be copied once more, into the loop's results.
                nonlocal keys, values
                keys, values = map(put, (keys, values), (key, value), axes)
                own_keys = jax.lax.dynamic_index_in_dim(keys, number, keepdims=False)
                own_values = jax.lax.dynamic_index_in_dim(
                    values, number, keepdims=False
                )
                return unpack(own_keys), unpack(own_values)

            x = layer.decode_token(x, into, cross, mask, cross_mask, bias, adapters)
            return (x, keys, values), None

        layer_indices = jnp.arange(cache.keys.shape[0])
        xs = ((cache.cross_keys, cache.cross_values), layer_indices)
        carry = (self._embed(token[:, None]), cache.keys, cache.values)
        (x, keys, values), _ = self._scan(block, "decoder", carry, adapters, xs)
        return self._logits(x, adapters)[:, 0], cache._replace(keys=keys, values=values)

    def _embed(self, ids: Target) -> Hidden:
        return embed(self.embedding.get_value(), ids).astype(self.config.dtype)

    def _logits(self, x: Hidden, adapters: Adapters) -> Logits:
        x = self.decoder_norm(x)
        if self.scale_logits:
            x = x * self.config.d_model**-0.5
        if HEAD in adapters:
            return adapted_head(self, x, adapters)
        if self.config.tied:
            return unembed(x, self.embedding.get_value())
        return matmul(x, self.head.get_value())

    def _scan(
        self,
        block: Callable[..., tuple[Any, Any]],
        stack: Literal["encoder", "decoder"],
        carry: Any,
        adapters: Adapters,
        xs: Any = None,
    ) -> tuple[Any, Any]:
        layer_inputs = (of_stack(adapters, stack, self.config.adaptable), xs)
        blocks = getattr(self, stack)
        return scan_blocks(
            block, blocks, carry, layer_inputs, unroll=self.config.unroll
        )


def _keys(input_mask: Mask, line: Line | None) -> list[Bool[Array, "_ 1 1 _"]]:
    """Return the masks of the source for each group of rows."""
    return [
        mask[:, None, None, :]
        for mask in ([input_mask] if line is None else line.masks())
    ]


def decoder_inputs(
    labels: Int[Array, "B T"], *, start_id: int, pad_id: int
) -> Int[Array, "B T"]:
    """Return the labels shifted right behind the start token, ignored ones as padding."""
    shifted = jnp.roll(jnp.where(labels < 0, pad_id, labels), 1, axis=1)
    return shifted.at[:, 0].set(start_id)
