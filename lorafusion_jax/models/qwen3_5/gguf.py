"""Layout of these models in llama.cpp's GGUF files: the decoder's, with delta nets whose heads have another order.

A file repeats the heads of keys as a whole: of the R heads of values that each of K heads of keys serves, head r of key
head k is its head r K + k. Source: llama.cpp's conversion scripts (conversion/qwen.py).
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np

from ..architecture import GGUFLayout, GGUFTensor
from ..decoder import gguf as plain
from .config import MODEL_TYPES, Qwen35Config, read_config

_NAME = "qwen35"
# Key of a file -> field of a config.json.
_SIZES = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
_MODULES = plain.MODULES | {
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_OF_BLOCK = {
    f"{ours}.weight": f"{theirs}.weight"
    for ours, theirs in _MODULES.items()
    if ours != "ffn_norm"
}
_CHANGES: dict[str, Literal["", "decay", "taps"]] = {
    "ssm_a": "decay",
    "ssm_conv1d": "taps",
}
_OF_BLOCK |= {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}


def _config_json(
    metadata: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    return plain.config_json(
        metadata, tensors, {_NAME: ("qwen3_5_text", "Qwen3_5ForCausalLM")}, _fields
    )


def _fields(keys: plain.Keys, layers: int) -> dict[str, Any]:
    # The last blocks predict several tokens.
    layers -= keys.take("nextn_predict_layers", 0)
    interval = keys.size("full_attention_interval", 4)
    kinds = [
        "linear_attention" if layer % interval else "full_attention"
        for layer in range(1, layers + 1)
    ]
    fields = {field: keys.size(key) for key, field in _SIZES.items()}
    width = keys.size("ssm.inner_size") // fields["linear_num_value_heads"]
    return fields | {
        "num_hidden_layers": layers,
        "layer_types": kinds,
        "linear_value_head_dim": width,
    }


def _stored(
    content: Mapping[str, Any], names: Collection[str]
) -> dict[str, GGUFTensor]:
    config = read_config(content)
    places = {}
    assert isinstance(config, Qwen35Config)
    d = config.delta

    def order(width: int, before: int, rows: int) -> np.ndarray:
        """Return the file's order: rows `before` the heads of values keep their places, then `width` for each head."""
        moved = (
            np.arange(before, rows)
            .reshape(d.key_heads, -1, width)
            .swapaxes(0, 1)
            .ravel()
        )
        return np.concatenate([np.arange(before), moved])

    heads = partial(order, 1, 0)
    values = partial(order, d.d_value, 0)
    channels = partial(order, d.d_value, 2 * d.key_heads * d.d_key)
    orders = dict.fromkeys(("attn_qkv", "ssm_conv1d"), channels) | {
        "attn_gate": values,
        "ssm_out": values,
    }
    orders |= dict.fromkeys(("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"), heads)
    for name in names:
        block = re.fullmatch(r"blk\.(\d+)\.((\w+)(?:\.\w+)?)", name)
        module = block[3] if block else name.removesuffix(".weight")
        title = plain.OF_MODEL.get(name, name)
        if block and block[2] in _OF_BLOCK:
            if int(block[1]) >= config.num_layers:
                continue
            title = f"model.layers.{block[1]}.{_OF_BLOCK[block[2]]}"
        offset = 1.0 if module.endswith("_norm") and module != "ssm_norm" else 0.0
        change = _CHANGES.get(module, "")
        places[name] = GGUFTensor(
            re.sub(r"^model\b", config.stem, title),
            orders.get(module),
            int(module == "ssm_out"),
            offset,
            change,
        )
    return places


def _names(content: Mapping[str, Any]) -> list[str]:
    blocks = range(read_config(content).num_layers)
    return [
        *plain.OF_MODEL,
        *(f"blk.{number}.{name}" for number in blocks for name in _OF_BLOCK),
    ]


def _metadata(config: Qwen35Config) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    d = config.delta
    turned = config.rope.width // 2
    if d.d_key != d.d_value:
        raise ValueError(
            f"linear_value_head_dim is {d.d_value}: in GGUF it is linear_key_head_dim, {d.d_key}; use --format merged"
        )
    values: dict[str, Any] = dict(
        zip(_SIZES, (d.kernel, d.d_key, d.key_heads, d.value_heads), strict=True)
    )
    values |= {
        "ssm.inner_size": d.value_heads * d.d_value,
        "full_attention_interval": config.group,
    }
    # A pair of numbers turns by the first, second or third of a token's positions, which are equal in a text.
    values["rope.dimension_sections"] = [
        *(len(range(first, turned, 3)) for first in range(3)),
        0,
    ]
    keys, tensors = plain.metadata(config, _NAME)
    return keys | {f"{_NAME}.{key}": value for key, value in values.items()}, tensors


GGUF = GGUFLayout(
    architectures=dict.fromkeys(MODEL_TYPES, _NAME),
    config_json=_config_json,
    stored=_stored,
    names=_names,
    metadata=_metadata,
)
