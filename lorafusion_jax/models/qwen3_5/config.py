"""The structure of a Qwen 3.5, from its Hugging Face config: groups of layers, whose last one has attention.

The layers before it have a gated delta net, which has a state instead of keys and values.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypedDict

from ...support.reading import decode_as
from ..architecture import Layers, Site, Size, Stack
from ..decoder import hf_config
from ..decoder.config import DecoderConfig

MODEL_TYPES = ("qwen3_5", "qwen3_5_text")
_FULL = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """Sizes of a gated delta net.

    Attributes:
      key_heads: heads of queries and of keys; each serves value_heads / key_heads heads of values.
      kernel: number of tokens, itself included, that the convolution of a token reads.
    """

    key_heads: Size
    value_heads: Size
    d_key: Size
    d_value: Size
    kernel: Size

    @property
    def channels(self) -> int:
        """Numbers of a token that the convolution reads: queries, keys and values."""
        return 2 * self.key_heads * self.d_key + self.value_heads * self.d_value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen35Config(DecoderConfig):
    """Structure of a Qwen 3.5 and how to run it.

    Every place in a group is a stack: `delta0`, `delta1` and so on have the layers with a delta net, `full` those with
    attention.

    Attributes:
      delta: sizes of the delta nets.
      group: number of layers of a group.
    """

    family: ClassVar[str] = "qwen3_5"

    delta: Delta
    group: Layers

    @functools.cached_property
    def of_attention(self) -> DecoderConfig:
        """The structure of the layers with attention."""
        groups = self.num_layers // self.group
        return dataclasses.replace(self.plain(), num_layers=groups)

    @functools.cached_property
    def delta_maps(self) -> Mapping[str, tuple[int, int]]:
        """Shapes of a delta net's linear maps."""
        d = self.delta
        width = d.value_heads * d.d_value
        return {
            "in_proj_qkv": (self.d_model, d.channels),
            "in_proj_z": (self.d_model, width),
            "in_proj_b": (self.d_model, d.value_heads),
            "in_proj_a": (self.d_model, d.value_heads),
            "out_proj": (width, self.d_model),
        }

    @functools.cached_property
    def stacks(self) -> Mapping[str, Stack]:
        full = self.of_attention.stacks["decoder"]
        delta = full._replace(attentions=(), recurrent_heads=self.delta.value_heads)
        return {f"delta{place}": delta for place in range(self.group - 1)} | {
            _FULL: full
        }

    @functools.cached_property
    def sites(self) -> Mapping[str, Site]:
        structure = self.of_attention
        delta = {"linear_attn": self.delta_maps, "mlp": structure.maps["mlp"]}
        sites = {}
        for first, stack in enumerate(self.stacks):
            maps = structure.maps if stack == _FULL else delta
            for place, site in structure.sites_of(maps, first, self.group).items():
                sites[f"{stack}.{place}"] = site
        return sites


class _Json(TypedDict, total=False):
    """Further fields of a config.json, whose values transformers uses before it checks them, or not at all."""

    linear_num_key_heads: Size
    linear_num_value_heads: Size
    linear_key_head_dim: Size
    linear_value_head_dim: Size
    linear_conv_kernel_dim: Size
    layer_types: list[str] | None
    full_attention_interval: Layers
    attn_output_gate: Literal[True]
    hidden_act: Literal["silu"]
    text_config: dict[str, Any] | None


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Return the structure that a config.json describes; raises a ValueError that names a value which does not fit."""
    for fields in (
        raw,
        decode_as(dict(raw), _Json, "", allow_unknown=True).get("text_config") or {},
    ):
        decode_as(dict(fields), _Json, "", allow_unknown=True)
    return hf_config.read_config(raw, dict.fromkeys(MODEL_TYPES, _fields), Qwen35Config)


def _fields(hf: Any) -> dict[str, Any]:
    layers = hf.num_hidden_layers
    kinds = hf.layer_types
    group = (
        kinds.index("full_attention") + 1 if "full_attention" in kinds else layers + 1
    )
    if kinds != (["linear_attention"] * (group - 1) + ["full_attention"]) * (
        layers // group
    ):
        raise ValueError(
            f"layer_types is {kinds!r}: expected the {layers} layers in groups of one size, each of "
            "linear_attention with one full_attention at its end"
        )
    if hf.linear_num_value_heads % hf.linear_num_key_heads:
        heads = hf.linear_num_value_heads
        multiple = hf.linear_num_key_heads
        raise ValueError(
            f"linear_num_value_heads is {heads}: expected a multiple of linear_num_key_heads, {multiple}"
        )
    delta = Delta(
        key_heads=hf.linear_num_key_heads,
        value_heads=hf.linear_num_value_heads,
        d_key=hf.linear_key_head_dim,
        d_value=hf.linear_value_head_dim,
        kernel=hf.linear_conv_kernel_dim,
    )
    # In a text all three kinds of positions of a Qwen 3.5 are equal, so its rotation is the plain one.
    same = {
        "rope_reads": ("partial_rotary_factor",),
        "qk_norm": "head",
        "attention_gate": True,
        "norm_offset": 1.0,
    }
    return same | {"delta": delta, "group": group}
