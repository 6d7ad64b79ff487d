"""A second, tiny family of models: two stacks of other names than T5's, other sites, an untied head.

The reader's blocks see one token of the source at a time. The writer's see the mean of the tokens so far, and attend to
what the reader made of the source.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lorafusion_jax.models.architecture import Architecture, Attention, Checkpoint, Family, Site, Slot, Stack
from lorafusion_jax.models.layers import Base, Linear, RMSNorm, of_stack, scan_blocks
from lorafusion_jax.models.weights import matmul

_SIZES = ("vocab_size", "d_model", "d_ff", "reader_layers", "writer_layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig(Architecture):
    """Structure of a reader and a writer."""

    family: ClassVar[str] = "pair"
    targets: ClassVar[tuple[str, ...]] = ("up", "query")

    d_ff: int
    reader_layers: int
    writer_layers: int

    @functools.cached_property
    def stacks(self):
        attention = Attention(("source",), heads=2, kv_heads=2, d_head=self.d_model // 2)
        return {
            "reader": Stack(self.reader_layers, ("source",), (), self.d_ff, 2 * self.d_model + self.d_ff),
            "writer": Stack(self.writer_layers, ("target",), (attention,), self.d_ff, 4 * self.d_model + self.d_ff),
        }

    @functools.cached_property
    def sites(self):
        d, f = self.d_model, self.d_ff
        maps = {
            "reader.mix.up": (d, f, "source", "columns", "mix"),
            "reader.mix.down": (f, d, "source", "rows", "mixed"),
            "writer.talk.query": (d, d, "target", "columns", "ask"),
            "writer.talk.memory": (d, d, "source", "columns", "ask"),
            "writer.talk.back": (d, d, "target", "rows", "answer"),
            "writer.mix.up": (d, f, "target", "columns", "mix"),
            "writer.mix.down": (f, d, "target", "rows", "mixed"),
        }
        found = {}
        for name, (d_in, d_out, reads, split, stage) in maps.items():
            stack, module, last = name.split(".")
            path, layers = f"model.{stack}s.{{layer}}.{module}.{last}", self.stacks[stack].layers
            found[name] = Site(layers, d_in, d_out, path=path, reads=(reads,), split=split, stage=stage)
        return found


class PairCache(NamedTuple):
    """What the writer keeps: the source's memory by layer, and the sum of the tokens so far."""

    memory: Float[Array, "L B S D"]
    total: Float[Array, "B D"]


def _linear(stack: str, config: PairConfig, name: str, rngs: nnx.Rngs) -> Linear:
    site = config.sites[f"{stack}.{name}"]
    return Linear(name, site.layers, site.d_in, site.d_out, scale=site.d_in**-0.5, rngs=rngs)


class Mix(nnx.Module):
    """Two products with a tanh between them."""

    def __init__(self, stack: str, config: PairConfig, *, rngs: nnx.Rngs):
        self.norm = RMSNorm((config.stacks[stack].layers, config.d_model), 1e-6)
        self.up = _linear(stack, config, "mix.up", rngs)
        self.down = _linear(stack, config, "mix.down", rngs)

    def __call__(self, x, adapters):
        return x + self.down(jnp.tanh(self.up(self.norm(x), adapters)), adapters)


class Writer(nnx.Module):
    """Attention to the source's memory, then a mix."""

    def __init__(self, config: PairConfig, *, rngs: nnx.Rngs):
        self.norm = RMSNorm((config.writer_layers, config.d_model), 1e-6)
        self.query, self.memory, self.back = (
            _linear("writer", config, f"talk.{name}", rngs) for name in ("query", "memory", "back")
        )
        self.mix = Mix("writer", config, rngs=rngs)

    def __call__(self, x, memory, mask, adapters):
        query, memory = (a.reshape(*a.shape[:2], 2, -1) for a in (self.query(self.norm(x), adapters), memory))
        scores = jnp.einsum("bthk,bshk->bhts", query, memory)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e9), axis=-1)
        heard = jnp.einsum("bhts,bshk->bthk", weights, memory).reshape(x.shape)
        return self.mix(x + self.back(heard, adapters), adapters)


class Pair(nnx.Module):
    """A reader and a writer with random weights."""

    def __init__(self, config: PairConfig, *, rngs: nnx.Rngs):
        self.config: Architecture = config
        self.embedding = Base(rngs.params.normal((config.vocab_size, config.d_model)))
        self.reader = Mix("reader", config, rngs=rngs)
        self.writer = Writer(config, rngs=rngs)
        self.norm = RMSNorm((config.d_model,), 1e-6)
        self.head = Base(config.d_model**-0.5 * rngs.params.normal((config.d_model, config.vocab_size)))

    def variables(self):
        talk = {f"writer.talk.{name}": getattr(self.writer, name).kernel for name in ("query", "memory", "back")}
        reader, writer = (
            {f"{stack}.mix.{name}": getattr(mix, name).kernel for name in ("up", "down")}
            for stack, mix in (("reader", self.reader), ("writer", self.writer.mix))
        )
        return reader | talk | writer | {"head": self.head}

    def label_logits(self, input_ids, input_mask, labels, adapters):
        start, count = jnp.full(labels.shape[:1], self.config.eos_id), jnp.arange(1, labels.shape[1] + 1)
        ids = jnp.concatenate([start[:, None], jnp.maximum(labels[:, :-1], 0)], axis=1)
        x = jnp.cumsum(self._embed(ids), axis=1) / count[None, :, None].astype(self.config.dtype)
        return self._write(x, self._memory(input_ids, adapters), input_mask, adapters)

    def prompt(self, input_ids, input_mask, length, adapters):
        start = jnp.full(input_ids.shape[:1], self.config.eos_id, jnp.int32)
        nothing = jnp.zeros((input_ids.shape[0], self.config.d_model), self.config.dtype)
        return start, PairCache(self._memory(input_ids, adapters), nothing)

    def decode_token(self, token, position, cache, input_mask, adapters):
        total = cache.total + self._embed(token)
        x = (total / (position + 1).astype(total.dtype))[:, None]
        return self._write(x, cache.memory, input_mask, adapters)[:, 0], cache._replace(total=total)

    def _embed(self, ids):
        return jnp.take(self.embedding[...], ids, axis=0).astype(self.config.dtype)

    def _memory(self, input_ids, adapters):
        x, _ = self._scan(
            lambda mix, x, a: (mix(x, a), None), self.reader, self._embed(input_ids), of_stack(adapters, "reader")
        )
        remember = lambda writer, x, a: (x, writer.memory(x, a))  # noqa: E731
        return self._scan(remember, self.writer, x, of_stack(adapters, "writer"))[1]

    def _write(self, x, memory, mask, adapters):
        def block(writer, x, of_layer):
            return writer(x, of_layer[0], mask, of_layer[1]), None

        x, _ = self._scan(block, self.writer, x, (memory, of_stack(adapters, "writer")))
        return matmul(self.norm(x), self.head.get_value())

    def _scan(self, block, stacked, x, xs):
        return scan_blocks(block, stacked, x, xs, remat=self.config.remat, unroll=self.config.unroll)


def _read_config(raw):
    return PairConfig(**{name: raw[name] for name in _SIZES})


def _others(model):
    norms = {"readers": model.reader.norm, "writers": model.writer.norm, "writers.mix": model.writer.mix.norm}
    slots = [Slot(model.embedding, ["tokens.weight"]), Slot(model.norm.scale, ["last.weight"])]
    for name, norm in norms.items():
        names = [f"norms.{name}.{layer}.weight" for layer in range(norm.scale.shape[0])]
        slots.append(Slot(norm.scale, names, stacked=True))
    return slots


FAMILY = Family(
    name="pair",
    members="pair",
    model_types=("pair",),
    config=PairConfig,
    read_config=_read_config,
    model=Pair,
    checkpoint=Checkpoint(embedding="tokens.weight", head="output.weight", others=_others),
    task_type="FEATURE_EXTRACTION",
    shapes={},
)
