"""What sets each family apart from Llama: a function from its config to fields of `DecoderConfig`, by `model_type`.

The configs are those of Hugging Face, completed by transformers. Next to fields, a function may return `partial_rope`,
whether a part of a head is rotated, and `activation` has Hugging Face's name.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from .config import Rope
from .hf_rope import rope_of

Fields = dict[str, Any]

# Patterns of models' names -> their families. A Mistral is often published as a Llama, also in every GGUF file.
# Names of tools are not those of models.
NAMES = {
    r"(?<!o)llama(?!.?(factory|cpp))|smollm(?!3)": ("llama",),
    "llava": ("llava",),
    "smolvlm": ("idefics3", "smolvlm"),
    "smollm3": ("smollm3",),
    "mistral": ("mistral", "mistral3", "llama"),
    "ministral": ("ministral", "ministral3", "mistral3", "mistral", "llama"),
    "qwen": ("qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    "gemma": ("gemma", "gemma2", "gemma3_text", "gemma3"),
    "granite": ("granite", "granitemoehybrid"),
    "olmo": ("olmo2", "olmo3"),
    "hunyuan|^hy-mt": ("hunyuan_v1_dense",),
    "gpt-?2": ("gpt2",),
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_OLMO: Fields = {"norms": ("", _FOUR_NORMS[1], "", _FOUR_NORMS[3]), "qk_norm": "all"}
_SHARED_MLP: Fields = {
    "fused": ("gate_up_proj",),
    "renamed": (
        ("mlp.gate_up_proj", "shared_mlp.input_linear"),
        ("mlp.down_proj", "shared_mlp.output_linear"),
    ),
}
_GPT2: Fields = {
    "stem": "transformer",
    "fused": ("qkv_proj",),
    "gated": False,
    "biased": ("qkv_proj", "o_proj", "up_proj", "down_proj"),
    "renamed": (
        ("embed_tokens", "wte"),
        ("layers", "h"),
        ("norm", "ln_f"),
        ("self_attn.qkv_proj", "attn.c_attn"),
        ("self_attn.o_proj", "attn.c_proj"),
        ("mlp.up_proj", "mlp.c_fc"),
        ("mlp.down_proj", "mlp.c_proj"),
    ),
    "conv1d": True,
    "learned_positions": True,
    "norm": "layer",
    "norms": ("ln_1", "", "ln_2", ""),
}
_ROTATED_NORMS: Fields = {
    "qk_norm": "rotated",
    "renamed": (
        ("self_attn.q_norm", "self_attn.query_layernorm"),
        ("self_attn.k_norm", "self_attn.key_layernorm"),
    ),
}


def biased(hf: Any) -> tuple[str, ...]:
    """Return the sites that have a bias by the fields that most families share."""
    attention = _ATTENTION if getattr(hf, "attention_bias", False) else ()
    return (*attention, *(_MLP if getattr(hf, "mlp_bias", False) else ()))


def head_width(hf: Any) -> int:
    """Return the width of a head, which many configs leave out."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def _unrotated(hf: Any) -> Rope:
    """Return the positions of layers without rotation, to which no scaling for long contexts applies."""
    return Rope(width=head_width(hf), scaling="none")


def _windows(hf: Any) -> Fields:
    """Return the windows of the layers that the config lists, or of all layers."""
    kinds = (
        getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    )
    if not (window := getattr(hf, "sliding_window", None)):
        return {}
    return {
        "window": window,
        "sliding": tuple(kind == "sliding_attention" for kind in kinds),
    }


def _qwen2(hf: Any) -> Fields:
    return _windows(hf) | {"biased": _ATTENTION[:3]}


def _qwen3(hf: Any) -> Fields:
    return _windows(hf) | {"qk_norm": "head"}


def _gemma(hf: Any) -> Fields:
    return {"norm_offset": 1.0, "embedding_scale": hf.hidden_size**0.5}


def _gemma2(hf: Any) -> Fields:
    both = (
        _gemma(hf)
        | _windows(hf)
        | {"activation": hf.hidden_activation, "norms": _FOUR_NORMS}
    )
    caps = {
        "attention_cap": hf.attn_logit_softcapping or 0.0,
        "logit_cap": hf.final_logit_softcapping or 0.0,
    }
    return both | caps | {"query_scale": hf.query_pre_attn_scalar**-0.5}


def _gemma3(hf: Any) -> Fields:
    if hf.attn_logit_softcapping:
        raise ValueError(
            f"attn_logit_softcapping is {hf.attn_logit_softcapping} in a Gemma 3: expected none"
        )
    return _gemma2(hf) | {"qk_norm": "head"}


def _phi3(hf: Any) -> Fields:
    if hf.sliding_window:
        windows = {
            "window": hf.sliding_window,
            "sliding": (True,) * hf.num_hidden_layers,
        }
    else:
        windows = {}
    return windows | {"fused": ("qkv_proj", "gate_up_proj"), "partial_rope": True}


def _granite(hf: Any) -> Fields:
    return {
        "embedding_scale": hf.embedding_multiplier,
        "query_scale": hf.attention_multiplier,
        "residual_scale": hf.residual_multiplier,
        "logit_scale": 1 / hf.logits_scaling,
    }


def _granite4(hf: Any) -> Fields:
    if hf.num_local_experts:
        raise ValueError(
            f"num_local_experts is {hf.num_local_experts}, a mixture of experts: give a dense Granite"
        )
    if "linear_attention" in hf.layer_types:
        raise ValueError(
            "layer_types has Mamba layers, which are not implemented: give a Granite of attention alone"
        )
    fields = _granite(hf) | _SHARED_MLP | {"d_ff": hf.shared_intermediate_size}
    if hf.position_embedding_type == "rope":
        return fields
    return fields | {"rope": _unrotated(hf)}


def _ministral3(hf: Any) -> Fields:
    rope = rope_of(hf.rope_parameters, head_width(hf), hf.max_position_embeddings)
    growth = hf.rope_parameters.get("llama_4_scaling_beta", 0.0)
    return _windows(hf) | {"rope": dataclasses.replace(rope, query_growth=growth)}


def _smollm3(hf: Any) -> Fields:
    # Layers without rotary positions are those that may have a window.
    sliding = tuple(
        not rotated for rotated in hf.no_rope_layers[: hf.num_hidden_layers]
    )
    window = (hf.sliding_window or 0) if hf.use_sliding_window else 0
    if window and sliding != tuple(
        kind == "sliding_attention" for kind in hf.layer_types
    ):
        raise ValueError(
            "layer_types and no_rope_layers differ: expected windows in layers without rotary positions"
        )
    return {"window": window, "sliding": sliding, "local_rope": _unrotated(hf)}


def _hunyuan(hf: Any) -> Fields:
    width = head_width(hf)
    rope = rope_of(hf.rope_parameters, width, hf.max_position_embeddings)
    if rope.scaling == "dynamic" and (alpha := hf.rope_parameters.get("alpha")):
        # Not dynamic in spite of its name: one stretch for every length.
        theta = rope.theta * alpha ** (width / max(width - 2, 1))
        rope = dataclasses.replace(rope, theta=theta, scaling="default")
    return _ROTATED_NORMS | {"rope": rope}


def _gpt2(hf: Any) -> Fields:
    usual = {
        "add_cross_attention": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    }
    for name, value in usual.items():
        if getattr(hf, name) != value:
            raise ValueError(f"{name} is {getattr(hf, name)}: expected {value}")
    return _GPT2 | {
        "d_ff": hf.n_inner or 4 * hf.hidden_size,
        "num_kv_heads": hf.num_attention_heads,
        "eps": hf.layer_norm_epsilon,
        "activation": hf.activation_function,
        "rope": _unrotated(hf),
    }


# Models with the weights of another family next to parts that are left out, and that family.
ALIASES = {"llava_llama": "llama", "llava_mistral": "mistral"}
# Models for images and text, which are read for text alone, and the module that is their text model, one of `FAMILIES`.
WITH_IMAGES = dict.fromkeys(
    ("gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "llava"),
    "language_model",
)
WITH_IMAGES |= dict.fromkeys(("idefics3", "smolvlm"), "text_model")
FAMILIES: dict[str, Callable[[Any], Fields]] = {
    # It ignores a window, such as that of a Mistral whose weights it has.
    "llama": lambda hf: {},
    "mistral": _windows,
    "qwen2": _qwen2,
    "qwen2_vl_text": _qwen2,
    "qwen2_5_vl_text": _qwen2,
    "qwen3": _qwen3,
    "qwen3_vl_text": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "granitemoehybrid": _granite4,
    "ministral": _windows,
    "ministral3": _ministral3,
    "smollm3": _smollm3,
    "olmo2": lambda hf: _OLMO,
    "olmo3": lambda hf: _OLMO | _windows(hf),
    "hunyuan_v1_dense": _hunyuan,
    "gpt2": _gpt2,
}
