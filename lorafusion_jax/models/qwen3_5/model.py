"""A Qwen 3.5: a decoder whose groups of layers are scanned, most of them with a gated delta net instead of attention.

Axis letters: B batch, T target, C columns of the cache, H heads, K key width, V value width, D model width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ..decoder.model import MLP, Block, Cache, Context, Decoder
from ..layers import (
    Adapters,
    Base,
    Hidden,
    Line,
    Linear,
    RMSNorm,
    apart,
    of_stack,
    scan_blocks,
    together,
    widened,
)
from ..weights import SUM
from .config import Qwen35Config
from .delta_rule import delta_rule


class State(NamedTuple):
    """What a delta net keeps of the tokens so far: the last inputs of the convolution, and the memory."""

    inputs: Float[Array, "B _ _"]
    memory: Float[Array, "B H K V"]


class DeltaNet(nnx.Module):
    """A gated delta net behind a short convolution, with a gate for its output."""

    def __init__(self, config: Qwen35Config, *, rngs: nnx.Rngs):
        self.sizes = config.delta
        layers = config.of_attention.num_layers

        def linear(name: str) -> Linear:
            d_in, d_out = config.delta_shapes[name]
            return Linear(
                f"linear_attn.{name}", layers, d_in, d_out, scale=d_in**-0.5, rngs=rngs
            )

        self.in_proj_qkv = linear("in_proj_qkv")
        self.in_proj_z = linear("in_proj_z")
        self.in_proj_b = linear("in_proj_b")
        self.in_proj_a = linear("in_proj_a")
        self.out_proj = linear("out_proj")
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
        into: Callable[[Cache], Cache] = lambda new: new,
    ) -> tuple[Hidden, Cache]:
        """Run one group, from the states of its delta nets; see `decoder.model.SelfAttention` for the others."""
        after = []
        for place, name in enumerate(self.deltas):
            state = None if states is None else states[place]
            x, new = getattr(self, name)(x, contexts, adapters[name], line, state)
            after.append(new)
        x, cache = self.full(x, contexts, adapters["full"], line, into)
        return x, cache._replace(states=tuple(after))


class Qwen35(Decoder):
    """A Qwen 3.5 with random weights."""

    blocks: ClassVar[type[Any]] = Group
    prefix: ClassVar[str] = "decoder."

    def _contexts(
        self,
        positions: Int[Array, "B T"],
        lengths: Int[Array, "B #T"],
        seen: Bool[Array, "B T C"],
        places: Int[Array, "#B T"],
        columns: Int[Array, "#B C"],
    ) -> Callable[[Bool[Array, ""] | None], Context]:
        context = super()._contexts(positions, lengths, seen, places, columns)(None)
        # A real token attends to itself.
        real = jnp.any(seen & (columns[:, None, :] == places[:, :, None]), axis=-1)
        context = context._replace(real=real)
        return lambda local: context

    def _scan(
        self,
        block: Callable[..., tuple[Any, Any]],
        carry: Any,
        adapters: Adapters,
        numbers: Any,
    ) -> tuple[Any, Any]:
        sites = self.config.sites
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
