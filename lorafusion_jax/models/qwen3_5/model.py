"""A Qwen 3.5: a decoder whose groups of layers are scanned, most of them with a gated delta net instead of attention.

A net's memory fades with every token, and is corrected at the token's key:

    memory <- exp(decay) memory;  memory <- memory + beta key (value - key memory);  output = query memory / sqrt(K)

Tokens are computed in chunks. Within one, the corrections solve a triangular system of equations, so that only chunks
follow each other. Source: Yang et al., "Gated Delta Networks" (2024), and transformers.

Axis letters: B batch, T target, C columns of the cache or tokens of a chunk, G heads of keys, H heads of values, K key
width, V value width, D model width, N chunks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from ..decoder.model import (
    MLP,
    Block,
    Cache,
    Context,
    Contexts,
    Decoder,
    Into,
    linear_map,
)
from ..layers import (
    Adapters,
    Base,
    Hidden,
    Line,
    Linear,
    RMSNorm,
    Target,
    apart,
    of_stack,
    scan_blocks,
    together,
    widened,
)
from ..weights import SUM
from .config import Qwen35Config

CHUNK = 64
_EPS = 1e-6


class State(NamedTuple):
    """What a delta net keeps of the tokens so far: the last inputs of the convolution, and the memory."""

    inputs: Float[Array, "B _ _"]
    memory: Float[Array, "B H K V"]


class DeltaNet(nnx.Module):
    """A gated delta net behind a short convolution, with a gate for its output."""

    in_proj_qkv: Linear
    in_proj_z: Linear
    in_proj_b: Linear
    in_proj_a: Linear
    out_proj: Linear

    def __init__(self, config: Qwen35Config, *, rngs: nnx.Rngs):
        self.sizes = config.delta
        layers = config.of_attention.num_layers
        for name, shape in config.delta_maps.items():
            place = f"linear_attn.{name}"
            setattr(self, name, linear_map(config.of_attention, place, shape, rngs))
        channels = self.sizes.channels
        kernel = self.sizes.kernel
        heads = self.sizes.value_heads
        self.conv1d = Base(
            kernel**-0.5 * rngs.params.normal((layers, channels, 1, kernel))
        )
        self.A_log = Base(jnp.zeros((layers, heads)))
        self.dt_bias = Base(jnp.ones((layers, heads)))
        self.norm = RMSNorm((layers, self.sizes.d_value), config.eps)

    def __call__(
        self,
        x: Hidden,
        contexts: Sequence[Context],
        adapters: Adapters,
        line: Line | None,
        state: State | None,
    ) -> tuple[Hidden, State]:
        """Return the outputs, and the state after the rows of the last group, which begin with `state` or with none."""
        parts = [
            linear(x, adapters)
            for linear in (self.in_proj_qkv, self.in_proj_b, self.in_proj_a)
        ]
        mixed = []
        after = None
        for qkv, b, a, context in zip(
            *(apart(part, line) for part in parts), contexts, strict=True
        ):
            assert context.real is not None
            heard, after = self._mix(
                widened(qkv), widened(b), widened(a), context.real, state
            )
            mixed.append(heard.astype(x.dtype).reshape(*heard.shape[:2], -1))
        assert after is not None
        heads = together(mixed, line, x.shape).reshape(
            *x.shape[:2], -1, self.sizes.d_value
        )
        gate = jax.nn.silu(widened(self.in_proj_z(x, adapters)))
        gated = widened(self.norm(heads)) * gate.reshape(heads.shape)
        return self.out_proj(
            gated.astype(x.dtype).reshape(*x.shape[:2], -1), adapters
        ), after

    def _mix(
        self,
        qkv: Float[Array, "B T _"],
        b: Float[Array, "B T H"],
        a: Float[Array, "B T H"],
        real: Bool[Array, "B T"],
        state: State | None,
    ) -> tuple[Float[Array, "B T H V"], State]:
        s = self.sizes
        batch, length, channels = qkv.shape
        dtype = qkv.dtype
        if state is None:
            memory = jnp.zeros((batch, s.value_heads, s.d_key, s.d_value), dtype)
            state = State(jnp.zeros((batch, s.kernel - 1, channels), dtype), memory)
        # Padding is zero here, so that it leaves a memory of zeros as it is.
        inputs = jnp.concatenate(
            [state.inputs, jnp.where(real[..., None], qkv, 0)], axis=1
        )
        taps = self.conv1d[...].astype(dtype).transpose(2, 1, 0)
        convolved = sum(
            inputs[:, tap : tap + length] * taps[tap][None] for tap in range(s.kernel)
        )
        parts = jnp.split(
            jax.nn.silu(convolved),
            [s.key_heads * s.d_key, 2 * s.key_heads * s.d_key],
            axis=-1,
        )
        q = parts[0].reshape(batch, length, -1, s.d_key)
        k = parts[1].reshape(batch, length, -1, s.d_key)
        v = parts[2].reshape(batch, length, -1, s.d_value)
        A_log = self.A_log[...].astype(dtype)[None, None]
        bias = self.dt_bias[...].astype(dtype)[None, None]
        decay = -jnp.exp(A_log) * jax.nn.softplus(a + bias)
        heard, memory = delta_rule(q, k, v, decay, jax.nn.sigmoid(b), state.memory)
        return heard, State(inputs[:, length:], memory)


class DeltaBlock(nnx.Module):
    """Delta net and feed-forward, weights stacked over groups."""

    def __init__(self, config: Qwen35Config, *, rngs: nnx.Rngs):
        shape = (config.of_attention.num_layers, config.d_model)
        self.input_norm = RMSNorm(shape, config.eps, offset=config.norm_offset)
        self.mlp_norm = RMSNorm(shape, config.eps, offset=config.norm_offset)
        self.linear_attn = DeltaNet(config, rngs=rngs)
        self.mlp = MLP(config.of_attention, rngs=rngs)

    def __call__(
        self,
        x: Hidden,
        contexts: Sequence[Context],
        adapters: Adapters,
        line: Line | None,
        state: State | None,
    ) -> tuple[Hidden, State]:
        """Run one layer; see `DeltaNet`."""
        heard, after = self.linear_attn(
            self.input_norm(x), contexts, adapters, line, state
        )
        x = checkpoint_name(x + heard, SUM)
        return x + self.mlp(self.mlp_norm(x), adapters), after


class Group(nnx.Module):
    """The layers of a group, each stacked over groups."""

    def __init__(self, config: Qwen35Config, *, rngs: nnx.Rngs):
        self.deltas = tuple(config.stacks)[:-1]
        for name in self.deltas:
            setattr(self, name, DeltaBlock(config, rngs=rngs))
        self.full = Block(config.of_attention, rngs=rngs)

    def __call__(
        self,
        states: Sequence[State] | None,
        x: Hidden,
        contexts: Sequence[Context],
        adapters: dict[str, Adapters],
        line: Line | None = None,
        into: Into = lambda new, _: new,
    ) -> tuple[Hidden, list[Cache]]:
        """Run one group, from the states of its delta nets; see `decoder.model.SelfAttention` for the others."""
        after = []
        for place, name in enumerate(self.deltas):
            state = None if states is None else states[place]
            x, new = getattr(self, name)(x, contexts, adapters[name], line, state)
            after.append(new)
        x, caches = self.full(x, contexts, adapters["full"], line, into)
        return x, [cache._replace(states=tuple(after)) for cache in caches]


class Qwen35(Decoder):
    """A Qwen 3.5 with random weights."""

    prefix: ClassVar[str] = "decoder."

    def _blocks(self, config: Qwen35Config, rngs: nnx.Rngs) -> Group:
        return Group(config, rngs=rngs)

    def _of_layer(self, contexts: Contexts, local: Bool[Array, ""] | None) -> Any:
        return contexts.everywhere._replace(real=contexts.real)

    def _scan(
        self,
        block: Callable[..., tuple[Any, Any]],
        carry: Any,
        ids: Target,
        adapters: Adapters,
        numbers: Any,
    ) -> tuple[Any, Any]:
        sites = self.config.adaptable
        stack_adapters = {
            stack: of_stack(adapters, stack, sites) for stack in self.config.stacks
        }

        def with_states(
            group: Group, carry: Any, group_inputs: tuple[Any, None, Any]
        ) -> tuple[Any, Any]:
            states = None if group_inputs[2] is None else group_inputs[2][1]
            return block(partial(group, states), carry, group_inputs)

        return scan_blocks(
            with_states,
            self.decoder,
            carry,
            (stack_adapters, None, numbers),
            unroll=self.config.unroll,
        )


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
    chunk = min(1 << (length - 1).bit_length(), CHUNK)  # a power of two

    def normalised(a: Array) -> Array:
        a = a * jax.lax.rsqrt(jnp.sum(jnp.square(a), axis=-1, keepdims=True) + _EPS)
        return jnp.repeat(a, values.shape[2] // a.shape[2], axis=2)

    def in_chunks(a: Array) -> Array:
        """Return [B, T, H, ...] as [N, B, H, C, ...], filled up with zeros."""
        a = jnp.pad(a, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(
            a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), (1, 3), (0, 2)
        )

    queries = normalised(queries) * queries.shape[-1] ** -0.5
    q, k, v, g, b = map(in_chunks, (queries, normalised(keys), values, decay, beta))
    faded = jnp.cumsum(g, axis=-1)  # since the chunk began
    causal = jnp.tril(jnp.ones((1, 1, 1, chunk, chunk), bool))
    between = jnp.exp(
        jnp.where(causal, faded[..., :, None] - faded[..., None, :], -jnp.inf)
    )
    weighted_keys = k * b[..., None]
    overlap = jnp.tril((weighted_keys @ jnp.swapaxes(k, -1, -2)) * between, -1)
    scores = (q @ jnp.swapaxes(k, -1, -2)) * between
    since = jnp.exp(faded)[..., None]
    unsolved = jnp.concatenate([v * b[..., None], weighted_keys * since], axis=-1)
    solved = _solved(overlap, unsolved)
    until = jnp.exp(faded[..., -1:] - faded)[..., None]

    def step(memory: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        new, read, scores, q, k, decay_of_memory = chunk
        corrections = new - read @ memory
        outputs = q @ memory + scores @ corrections
        return memory * decay_of_memory + jnp.swapaxes(k, -1, -2) @ corrections, outputs

    new, read = jnp.split(solved, [values.shape[-1]], axis=-1)
    memory, outputs = jax.lax.scan(
        step, memory, (new, read, scores, q * since, k * until, since[..., -1:, :])
    )
    outputs = jnp.moveaxis(outputs, (0, 2), (1, 3))
    return outputs.reshape(outputs.shape[0], -1, *outputs.shape[3:])[:, :length], memory


def _solved(
    below: Float[Array, "*B C C"], right: Float[Array, "*B C D"]
) -> Float[Array, "*B C D"]:
    """Return the x with `x + below x = right`, given numbers below the diagonal alone; C is a power of two.

    By products, as fast as `triangular_solve`: two calls of that in one program wait for each other for ever on two
    cores (jaxlib 0.10.2, see `adapters.pool`).
    """
    multiply = partial(jnp.matmul, precision="highest")
    size = below.shape[-1]
    inverse = jnp.ones((*below.shape[:-2], size, 1, 1), below.dtype)
    while (count := inverse.shape[-3] // 2) > 0:
        # Two blocks on the diagonal become one: the inverse of [[A, 0], [C, B]] has -B^-1 C A^-1 in its corner.
        first = inverse[..., ::2, :, :]
        second = inverse[..., 1::2, :, :]
        parts = below.reshape(
            *below.shape[:-2],
            count,
            2,
            size // count // 2,
            count,
            2,
            size // count // 2,
        )
        corners = jnp.moveaxis(
            jnp.diagonal(parts[..., 1, :, :, 0, :], axis1=-4, axis2=-2), -1, -3
        )
        corner = -multiply(multiply(second, corners), first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate(
            [upper, jnp.concatenate([corner, second], axis=-1)], axis=-2
        )
    inverse = inverse[..., 0, :, :]
    return jax.lax.custom_linear_solve(
        lambda x: x + multiply(below, x),
        right,
        lambda _, b: multiply(inverse, b),
        lambda _, b: multiply(jnp.swapaxes(inverse, -1, -2), b),
    )
