"""Dense Gemma 4 models, of text alone: a decoder whose layers come in groups.

A group has layers with a sliding window, and at its end one with full attention, wider heads and another rotation.
Every layer may have inputs of its own, from a second embedding. The layers of the last groups may share the keys and
values of the last group before them. Source: transformers.

Axis letters: B batch, T target, C columns, L layer, P width of a layer's own input.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from .architecture import Checkpoint, Family, Layers, Site, Size, Slot, Stack
from .bit_cast import unpack
from .decoder import families, hf_config, slots_of_block, slots_of_model, stacked_slots
from .decoder.config import DecoderConfig
from .decoder.hf_rope import rope_of
from .decoder.model import (
    ACTIVATIONS,
    Block,
    Cache,
    Context,
    Contexts,
    Decoder,
    Into,
    KeysValues,
    linear_map,
)
from .layers import (
    Adapters,
    Base,
    Hidden,
    Line,
    Linear,
    RMSNorm,
    Target,
    of_stack,
    scan_blocks,
    widened,
)
from .weights import embed, matmul

_MODEL_TYPES = ("gemma4", "gemma4_text")
_KEYS_VALUES = ("k_proj", "v_proj", "k_norm", "v_norm")
_OTHER_PARTS = ("vision_tower.*", "audio_tower.*", "embed_vision.*", "embed_audio.*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Config(DecoderConfig):
    """Structure of a Gemma 4 and how to run it. Every place in a group is a stack, apart for groups that share.

    Attributes:
      group: number of layers of a group.
      sharing: number of the last groups, whose keys and values are those of the last group before.
      wide: factor of the feed-forward's width in these groups.
      full_head: width of heads with full attention.
      full_kv_heads: number of their heads of keys and values.
      keys_are_values: full attention has no matrix for values.
      per_layer: width of a layer's own input; 0 for none.
      per_layer_vocab: number of tokens in the embedding of these inputs.
    """

    family: ClassVar[str] = "gemma4"

    group: Layers
    sharing: int
    wide: Size
    full_head: Size
    full_kv_heads: Size
    keys_are_values: bool
    per_layer: int
    per_layer_vocab: Size

    @property
    def computing(self) -> int:
        """Number of groups that compute their keys and values."""
        return self.num_layers // self.group - self.sharing

    @functools.cached_property
    def structures(self) -> Mapping[str, DecoderConfig]:
        """The structure of every stack by its name, of groups that share behind the others."""
        replace = dataclasses.replace
        sliding = self.plain()
        full = replace(
            sliding,
            d_head=self.full_head,
            num_kv_heads=self.full_kv_heads,
            absent=("v_proj",) if self.keys_are_values else (),
        )
        kinds = [sliding] * (self.group - 1) + [full]
        structures = {
            f"computing{place}": replace(kind, num_layers=self.computing)
            for place, kind in enumerate(kinds)
        }
        if self.sharing:
            width = self.wide * self.d_ff
            absent = ("k_proj", "v_proj")
            structures |= {
                f"sharing{place}": replace(
                    kind, num_layers=self.sharing, absent=absent, d_ff=width
                )
                for place, kind in enumerate(kinds)
            }
        return structures

    def layers_of(self, stack: str) -> range:
        """Return the numbers of a stack's layers in the model."""
        place = list(self.structures).index(stack)
        if place < self.group:
            return range(place, self.computing * self.group, self.group)
        first = self.computing * self.group + place - self.group
        return range(first, self.num_layers, self.group)

    @functools.cached_property
    def stacks(self) -> Mapping[str, Stack]:
        return {
            name: structure.stacks["decoder"]
            for name, structure in self.structures.items()
        }

    @functools.cached_property
    def per_layer_maps(self) -> Mapping[str, tuple[int, int]]:
        """Shapes of the linear maps of layers' own inputs."""
        shapes = {
            "per_layer_input_gate": (self.d_model, self.per_layer),
            "per_layer_projection": (self.per_layer, self.d_model),
        }
        return shapes if self.per_layer else {}

    @functools.cached_property
    def sites(self) -> Mapping[str, Site]:
        sites = {}
        for stack, structure in self.structures.items():
            maps = {**structure.maps, "": self.per_layer_maps}
            first = self.layers_of(stack).start
            for place, site in structure.sites_of(maps, first, self.group).items():
                sites[f"{stack}.{place}"] = site
        return sites


class Gemma4Block(Block):
    """One place of the groups: a block with an input of its own, and a factor of its output."""

    per_layer_input_gate: Linear
    per_layer_projection: Linear

    def __init__(self, config: Gemma4Config, stack: str, *, rngs: nnx.Rngs):
        structure = config.structures[stack]
        super().__init__(structure, rngs=rngs)
        layers = structure.num_layers

        for name, shape in config.per_layer_maps.items():
            setattr(self, name, linear_map(structure, name, shape, rngs))
        if config.per_layer:
            self.per_layer_norm = RMSNorm((layers, config.d_model), config.eps)
        self.layer_scalar = Base(jnp.ones((layers, 1)))

    def with_input(
        self,
        per_layer: Float[Array, "B T P"] | None,
        x: Hidden,
        contexts: Sequence[Context],
        adapters: Adapters,
        line: Line | None,
        into: Into,
    ) -> tuple[Hidden, list[Cache]]:
        """Run one layer; see `SelfAttention`."""
        x, caches = self(x, contexts, adapters, line, into)
        if per_layer is not None:
            gate = self.per_layer_input_gate(x, adapters)
            activated = ACTIVATIONS[self.config.activation](widened(gate))
            gated = activated.astype(x.dtype) * per_layer
            x = x + self.per_layer_norm(self.per_layer_projection(gated, adapters))
        return x * self.layer_scalar[...].astype(x.dtype)[None, None], caches


class Group(nnx.Module):
    """The layers of a group by their stacks' names, each stacked over groups."""

    def __init__(self, blocks: Mapping[str, Gemma4Block]):
        self.stacks = tuple(blocks)
        for name, block in blocks.items():
            setattr(self, name, block)

    def __call__(
        self,
        per_layer: Float[Array, "L B T P"] | None,
        shared: Sequence[tuple[KeysValues, KeysValues]],
        x: Hidden,
        contexts: Sequence[tuple[Context, Context]],
        adapters: Mapping[str, Adapters],
        line: Line | None = None,
        into: Into = lambda new, _: new,
    ) -> tuple[Hidden, list[Cache]]:
        """Run one group.

        Contexts, and the keys and values that are `shared`, are those of a window and those of full attention.
        """
        caches = []
        for place, name in enumerate(self.stacks):
            full = place == len(self.stacks) - 1
            of_place = [context[full] for context in contexts]
            if shared:
                of_place = [
                    context._replace(shared=keys_values[full])
                    for context, keys_values in zip(of_place, shared, strict=True)
                ]
            x, new = getattr(self, name).with_input(
                None if per_layer is None else per_layer[place],
                x,
                of_place,
                adapters[name],
                line,
                lambda new, _, place=place: into(new, place),
            )
            caches.append(new)
        return x, [
            Cache(tuple(cache.attentions[0] for cache in of_rows))
            for of_rows in zip(*caches, strict=True)
        ]


class Gemma4(Decoder):
    """A Gemma 4 with random weights."""

    prefix: ClassVar[str] = "decoder."

    def __init__(self, config: Gemma4Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if config.per_layer:
            width = config.num_layers * config.per_layer
            self.per_layer_embedding = Base(
                0.02 * rngs.params.normal((config.per_layer_vocab, width))
            )
            self.per_layer_map = Base(
                config.d_model**-0.5 * rngs.params.normal((config.d_model, width))
            )
            self.per_layer_norm = RMSNorm((config.per_layer,), config.eps)

    def _blocks(self, config: Gemma4Config, rngs: nnx.Rngs) -> Group:
        return Group(
            {stack: Gemma4Block(config, stack, rngs=rngs) for stack in config.stacks}
        )

    def _of_layer(self, contexts: Contexts, local: Bool[Array, ""] | None) -> Any:
        return contexts.nearby, contexts.everywhere

    def _scan(
        self,
        block: Callable[..., tuple[Any, Any]],
        carry: Any,
        ids: Target,
        adapters: Adapters,
        numbers: Any,
    ) -> tuple[Any, Any]:
        config = self.config
        assert isinstance(config, Gemma4Config)
        per_layer = self._per_layer(ids) if config.per_layer else None

        def groups(
            name: str, first: int, count: int, carry: Any, numbers: Any, shared: Any
        ) -> tuple[Any, Any]:
            stacks = [stack for stack in config.stacks if stack.startswith(name)]
            of_groups = None
            if per_layer is not None:
                layers = per_layer[first * config.group :][: count * config.group]
                of_groups = layers.reshape(count, config.group, *layers.shape[1:])
            stack_adapters = {
                stack: of_stack(adapters, stack, config.adaptable) for stack in stacks
            }

            def with_inputs(group: Group, carry: Any, inputs: Any) -> tuple[Any, Any]:
                of_group = partial(group, inputs[1], shared)
                return block(of_group, carry, (inputs[0], None, inputs[2]))

            return scan_blocks(
                with_inputs,
                Group({stack: getattr(self.decoder, stack) for stack in stacks}),
                carry,
                (stack_adapters, of_groups, numbers),
                unroll=config.unroll,
            )

        carry, outputs = groups("computing", 0, config.computing, carry, numbers, ())
        if config.sharing:
            caches = outputs if numbers is None else [Cache(carry[1])]
            # Those of the last layer of each kind.
            shared = [
                tuple(
                    jax.tree.map(lambda a: unpack(a[-1]), attention)
                    for attention in cache.attentions[-2:]
                )
                for cache in caches
            ]
            further = jax.tree.map(lambda a: jnp.arange(config.sharing), numbers)
            carry, _ = groups(
                "sharing", config.computing, config.sharing, carry, further, shared
            )
        return carry, outputs

    def _per_layer(self, ids: Target) -> Float[Array, "L B T P"]:
        """Return the inputs of layers: from a token's second embedding, and from its first."""
        config = self.config
        assert isinstance(config, Gemma4Config)
        x = self._embed(ids, ())
        of_tokens = embed(self.per_layer_embedding.get_value(), ids).astype(x.dtype)
        mapped = matmul(x, self.per_layer_map.get_value()) * config.d_model**-0.5
        shape = (*ids.shape, config.num_layers, config.per_layer)
        normed = self.per_layer_norm(mapped.reshape(shape))
        scaled = of_tokens.reshape(shape) * jnp.asarray(config.per_layer**0.5, x.dtype)
        return jnp.moveaxis((normed + scaled) * 2.0**-0.5, 2, 0)


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Return the structure that a config.json describes; raises a ValueError that names a value which does not fit."""
    return hf_config.read_config(raw, {"gemma4_text": _fields}, Gemma4Config)


def _fields(hf: Any) -> dict[str, Any]:
    if hf.enable_moe_block:
        raise ValueError(
            "enable_moe_block is set, a mixture of experts: give a dense Gemma 4"
        )
    layers = hf.num_hidden_layers
    group = hf.layer_types.index("full_attention") + 1
    kinds = ["sliding_attention"] * (group - 1) + ["full_attention"]
    sharing, apart = divmod(hf.num_kv_shared_layers, group)
    if group == 1 or apart or hf.layer_types != kinds * (layers // group):
        raise ValueError(
            f"layer_types is {hf.layer_types!r} and num_kv_shared_layers {hf.num_kv_shared_layers}: expected groups of "
            "one size, each of sliding_attention with one full_attention at its end, and whole groups that share"
        )
    full = hf.per_layer_config["full_attention"]
    rope = hf.rope_parameters["full_attention"]
    return families.windows(hf) | {
        "activation": hf.hidden_activation,
        "rope": rope_of(rope, full.head_dim, hf.max_position_embeddings),
        "norms": families.FOUR_NORMS,
        "qk_norm": "head",
        "value_norm": True,
        "query_scale": 1.0,
        "embedding_scale": hf.hidden_size**0.5,
        "logit_cap": hf.final_logit_softcapping or 0.0,
        "group": group,
        "sharing": sharing,
        "wide": 2 if hf.use_double_wide_mlp else 1,
        "full_head": full.head_dim,
        "full_kv_heads": full.num_key_value_heads,
        "keys_are_values": hf.attention_k_eq_v,
        "per_layer": hf.hidden_size_per_layer_input or 0,
        "per_layer_vocab": hf.vocab_size_per_layer_input,
    }


def _others(model: Gemma4) -> list[Slot]:
    config = model.structure
    assert isinstance(config, Gemma4Config)
    slots = slots_of_model(model)
    for stack, structure in config.structures.items():
        block = getattr(model.decoder, stack)
        layers = config.layers_of(stack)
        variables = {"layer_scalar": block.layer_scalar}
        if config.per_layer:
            norm = block.per_layer_norm
            variables["post_per_layer_input_norm.weight"] = norm.scale
        slots += slots_of_block(block, structure, layers)
        slots += stacked_slots(variables, structure, layers)
    if config.per_layer:
        variables = {
            "embed_tokens_per_layer": model.per_layer_embedding,
            "per_layer_model_projection": model.per_layer_map,
            "per_layer_projection_norm": model.per_layer_norm.scale,
        }
        slots += [
            Slot(
                variable,
                [f"{config.stem}.{name}.weight"],
                transposed=name == "per_layer_model_projection",
            )
            for name, variable in variables.items()
        ]
    return slots


def _checkpoint(config: Gemma4Config) -> Checkpoint:
    sharing = range(config.computing * config.group, config.num_layers)
    return Checkpoint(
        embedding=config.embedding,
        head="lm_head.weight",
        # Files hold matrices for the keys and values of layers that share those of others.
        unused=tuple(
            f"{config.stem}.layers.{layer}.self_attn.{name}.weight"
            for layer in sharing
            for name in _KEYS_VALUES
        ),
        unread=()
        if config.stem == "model"
        else (*_OTHER_PARTS, *(f"model.{name}" for name in _OTHER_PARTS)),
        others=_others,
    )


FAMILY = Family(
    name="gemma4",
    members="dense Gemma 4",
    model_types=_MODEL_TYPES,
    names={"gemma": _MODEL_TYPES},
    config=Gemma4Config,
    read_config=read_config,
    model=Gemma4,
    checkpoint=_checkpoint,
    task_type="CAUSAL_LM",
    shapes={},
)
