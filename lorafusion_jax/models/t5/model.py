"""T5 1.0, T5 1.1 and FLAN-T5 as a Flax NNX module whose blocks are stacked and scanned.

The module holds the frozen base weights. Adapters are an argument: a mapping from site to a callable pytree
whose leaves have a leading layer axis, sliced by the same scan as the blocks. `nnx.split` the model and
pass the state as an argument to `jax.jit`, `jax.grad`, `jax.vmap`; nothing here uses nnx transforms.

Axis letters: B batch, T target, S source, L layer, D model width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..layers import Adapters, Base, FeedForward, RMSNorm
from ..narrow import from_bits, to_bits
from ..sites import sites
from ..weights import PRODUCT, Weight, dense, matmul, scan_layers
from .attention import Attention, RelativeBias

_REMAT_POLICIES = {
    # Keeps the products with weights and recomputes the cheap rest: half the memory of saving everything
    # at the same speed; the attention products have batch dimensions and are recomputed.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Structure of a T5 and how to run it. Hashable, so it may be a static argument.

    Attributes:
      gated: gated GELU feed-forward (T5 1.1, FLAN) rather than ReLU (T5 1.0).
      tied: the head is the embedding, transposed.
      scale_logits: the decoder's output is multiplied by d_model ** -0.5 before the head.
      dtype: of activations; weights are cast to it where they are used.
      remat: what the backward pass keeps of a block: `dots`, everything (`none`) or nothing (`full`).
      unroll: compile the layers one after the other instead of a loop; slower to compile, faster for few layers.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int
    gated: bool = True
    tied: bool = False
    scale_logits: bool = False
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    pad_id: int = 0
    eos_id: int = 1
    start_id: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["dots", "none", "full"] = "dots"
    unroll: bool = False


class Cache(NamedTuple):
    """What the decoder's layers keep between tokens: own keys and values so far, and those of the source."""

    keys: Float[Array, "L B H K T"]
    values: Float[Array, "L B H T K"]
    cross_keys: Float[Array, "L B H K S"]
    cross_values: Float[Array, "L B H S K"]


class EncoderBlock(nnx.Module):
    """Self-attention and feed-forward, weights stacked over layers."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        layers, c = config.num_layers, config
        self.self_norm = RMSNorm((layers, c.d_model), c.eps)
        self.self_attention = Attention("self", c.d_model, c.num_heads, c.d_kv, layers=layers, rngs=rngs)
        self.ff_norm = RMSNorm((layers, c.d_model), c.eps)
        self.ff = FeedForward(c.d_model, c.d_ff, layers=layers, gated=c.gated, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "B 1 1 S"],
        bias: Float[Array, "1 H S S"],
        adapters: Adapters,
    ) -> Float[Array, "B S D"]:
        """Run one layer of the source."""
        normed = self.self_norm(x)
        keys, values = self.self_attention.keys_values(normed, adapters)
        x = x + self.self_attention(normed, keys, values, mask, bias, adapters)
        return x + self.ff(self.ff_norm(x), adapters)


class DecoderBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, weights stacked over layers."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        layers, c = config.num_decoder_layers, config
        self.self_norm = RMSNorm((layers, c.d_model), c.eps)
        self.self_attention = Attention("self", c.d_model, c.num_heads, c.d_kv, layers=layers, rngs=rngs)
        self.cross_norm = RMSNorm((layers, c.d_model), c.eps)
        self.cross_attention = Attention("cross", c.d_model, c.num_heads, c.d_kv, layers=layers, rngs=rngs)
        self.ff_norm = RMSNorm((layers, c.d_model), c.eps)
        self.ff = FeedForward(c.d_model, c.d_ff, layers=layers, gated=c.gated, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        mask: Bool[Array, "1 1 T T"],
        cross_mask: Bool[Array, "B 1 1 S"],
        bias: Float[Array, "1 H T T"],
        adapters: Adapters,
    ) -> Float[Array, "B T D"]:
        """Run one layer of the target (teacher forcing)."""
        normed = self.self_norm(x)
        own = self.self_attention.keys_values(normed, adapters)
        x = x + self.self_attention(normed, *own, mask, bias, adapters)
        cross = self.cross_attention.keys_values(encoded, adapters)
        return self._after_self_attention(x, cross, cross_mask, adapters)

    def decode_token(
        self,
        x: Float[Array, "B 1 D"],
        cache: Cache,
        position: Int[Array, ""],
        mask: Bool[Array, "1 1 1 T"],
        cross_mask: Bool[Array, "B 1 1 S"],
        bias: Float[Array, "1 H 1 T"],
        adapters: Adapters,
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """Run one position, whose keys and values join this layer's cache (no layer axis here)."""
        normed = self.self_norm(x)
        key, value = self.self_attention.keys_values(normed, adapters)
        keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, key, position, axis=3)
        values = jax.lax.dynamic_update_slice_in_dim(cache.values, value, position, axis=2)
        x = x + self.self_attention(normed, keys, values, mask, bias, adapters)
        x = self._after_self_attention(x, (cache.cross_keys, cache.cross_values), cross_mask, adapters)
        return x, cache._replace(keys=keys, values=values)

    def _after_self_attention(
        self, x: Array, cross: tuple[Array, Array], cross_mask: Array, adapters: Adapters
    ) -> Array:
        x = x + self.cross_attention(self.cross_norm(x), *cross, cross_mask, None, adapters)
        return x + self.ff(self.ff_norm(x), adapters)


class T5(nnx.Module):
    """A T5 with T5's own random initialisation; `io.hf` fills it with pretrained weights."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = self.config = config
        relative = {
            "buckets": c.buckets,
            "heads": c.num_heads,
            "max_distance": c.max_distance,
            "scale": c.d_model**-0.5,
            "rngs": rngs,
        }
        self.embedding = Base(rngs.params.normal((c.vocab_size, c.d_model)))
        self.encoder_bias = RelativeBias(bidirectional=True, **relative)
        self.encoder = EncoderBlock(c, rngs=rngs)
        self.encoder_norm = RMSNorm((c.d_model,), c.eps)
        self.decoder_bias = RelativeBias(bidirectional=False, **relative)
        self.decoder = DecoderBlock(c, rngs=rngs)
        self.decoder_norm = RMSNorm((c.d_model,), c.eps)
        if not c.tied:
            self.head = Base(c.d_model**-0.5 * rngs.params.normal((c.d_model, c.vocab_size)))

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        input_mask: Bool[Array, "B S"],
        decoder_ids: Int[Array, "B T"],
        adapters: Adapters | None = None,
    ) -> Float[Array, "B T V"]:
        """Return the logits of every target position (teacher forcing)."""
        adapters = adapters or {}
        encoded = self.encode(input_ids, input_mask, adapters)
        return self.decode(decoder_ids, encoded, input_mask, adapters)

    def encode(
        self, input_ids: Int[Array, "B S"], input_mask: Bool[Array, "B S"], adapters: Adapters
    ) -> Float[Array, "B S D"]:
        """Return the encoder's output; padding is neither attended to nor meaningful."""
        positions = jnp.arange(input_ids.shape[1])
        bias = self.encoder_bias(positions, positions)
        mask = input_mask[:, None, None, :]

        def block(layer: EncoderBlock, x: Array, adapters: Adapters) -> tuple[Array, None]:
            return layer(x, mask, bias, adapters), None

        x, _ = self._scan(block, self.encoder, self._embed(input_ids), _of_stack(adapters, "encoder"))
        return self.encoder_norm(x)

    def decode(
        self,
        decoder_ids: Int[Array, "B T"],
        encoded: Float[Array, "B S D"],
        input_mask: Bool[Array, "B S"],
        adapters: Adapters,
    ) -> Float[Array, "B T V"]:
        """Return the logits of every position of `decoder_ids`, each seeing those before it."""
        positions = jnp.arange(decoder_ids.shape[1])
        bias = self.decoder_bias(positions, positions)
        mask = (positions[None, :] <= positions[:, None])[None, None]
        cross_mask = input_mask[:, None, None, :]

        def block(layer: DecoderBlock, x: Array, adapters: Adapters) -> tuple[Array, None]:
            return layer(x, encoded, mask, cross_mask, bias, adapters), None

        x, _ = self._scan(block, self.decoder, self._embed(decoder_ids), _of_stack(adapters, "decoder"))
        return self._logits(x)

    def start_cache(self, encoded: Float[Array, "B S D"], length: int, adapters: Adapters) -> Cache:
        """Return a cache for `length` target positions, with the source's keys and values computed."""

        def block(layer: DecoderBlock, x: Array, adapters: Adapters) -> tuple[Array, tuple[Array, Array]]:
            return x, layer.cross_attention.keys_values(x, adapters)

        _, (keys, values) = self._scan(block, self.decoder, encoded, _of_stack(adapters, "decoder"))
        layers, batch, heads, width, _ = keys.shape
        empty = jnp.zeros((layers, batch, heads, width, length), encoded.dtype)
        return Cache(empty, empty.swapaxes(3, 4), keys, values)

    def decode_token(
        self,
        token: Int[Array, " B"],
        position: Int[Array, ""],
        cache: Cache,
        input_mask: Bool[Array, "B S"],
        adapters: Adapters,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Return the logits that follow `token` at `position`, and the cache that includes it."""
        positions = jnp.arange(cache.keys.shape[-1])
        bias = self.decoder_bias(position[None], positions)
        mask = (positions <= position)[None, None, None, :]
        cross_mask = input_mask[:, None, None, :]

        def block(layer: DecoderBlock, x: Array, xs: tuple[Adapters, Cache]) -> tuple[Array, tuple[Array, Array]]:
            adapters, layer_cache = xs
            x, layer_cache = layer.decode_token(x, layer_cache, position, mask, cross_mask, bias, adapters)
            return x, (layer_cache.keys, layer_cache.values)  # the source's do not change: no copy of them

        xs = (_of_stack(adapters, "decoder"), cache)
        x, (keys, values) = self._scan(block, self.decoder, self._embed(token[:, None]), xs)
        return self._logits(x)[:, 0], cache._replace(keys=keys, values=values)

    def _embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return jnp.take(self.embedding[...], ids, axis=0).astype(self.config.dtype)

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        x = self.decoder_norm(x)
        if self.config.scale_logits:
            x = x * self.config.d_model**-0.5
        if self.config.tied:
            return jnp.einsum("btd,vd->btv", x, dense(self.embedding[...], x.dtype))
        return matmul(x, self.head.get_value())

    def _scan(
        self, block: Callable[..., tuple[Array, Any]], stacked: nnx.Module, x: Array, xs: Any
    ) -> tuple[Array, Any]:
        """Run `block(layer, x, xs of the layer)` through the layers; return the last x and all outputs."""
        graph, state = nnx.split(stacked)

        def body(x: Any, layer: Any) -> tuple[Any, Any]:
            x, (weights, of_layer) = from_bits((x, layer))
            return to_bits(block(nnx.merge(graph, weights), x, of_layer))

        if self.config.remat != "none":
            body = jax.checkpoint(body, policy=_REMAT_POLICIES[self.config.remat], prevent_cse=False)
        return from_bits(scan_layers(body, *to_bits((x, (state, xs))), unroll=self.config.unroll))


def kernels(model: T5) -> dict[str, Weight]:
    """Return the kernel of every site, [L, d_in, d_out], in the order of `sites.sites`."""
    return {site: variable.get_value() for site, variable in _variables(model).items()}


def matrices(model: T5) -> dict[str, Weight]:
    """Return every weight that multiplies activations: the kernels, and `head` [D, V] where it is not tied."""
    return kernels(model) | ({} if model.config.tied else {"head": model.head.get_value()})


def set_matrices(model: T5, weights: Mapping[str, Weight]) -> None:
    """Put other weights in place of some of those that `matrices` returns."""
    variables = _variables(model) | ({} if model.config.tied else {"head": model.head})
    for name, weight in weights.items():
        variables[name].set_value(weight)


def _variables(model: T5) -> dict[str, Base]:
    modules = {"self": "self_attention", "cross": "cross_attention", "ff": "ff"}
    found = {}
    for site in sites(model.config):
        stack, module, name = site.split(".")
        found[site] = getattr(getattr(getattr(model, stack), modules[module]), name).kernel
    return found


def _of_stack(adapters: Adapters, stack: str) -> Mapping[str, Any]:
    prefix = f"{stack}."
    return {site.removeprefix(prefix): a for site, a in adapters.items() if site.startswith(prefix)}
