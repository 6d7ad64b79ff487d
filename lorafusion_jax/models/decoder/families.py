"""What sets each family apart from Llama: a function from its config to fields of `DecoderConfig`, by `model_type`.

The configs are those of Hugging Face, completed by transformers; `hf_config.read_config` reads the fields that all
families share. Fields that a function leaves out are as in Llama. Three entries differ from those of `DecoderConfig`:

* `activation` is Hugging Face's name of the function;
* `renamed` is a dictionary from a module's path in Llama to its path in the family;
* `rope_reads` names fields of the config's rotary positions that only some families read (see `hf_rope.rope_of`).
"""

from collections.abc import Callable
from typing import Any

from .config import DecoderConfig, Rope

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
    "pythia|gpt-?neox": ("gpt_neox",),
    "falcon(?!.?(h1|mamba|3))": ("falcon",),
    r"phi-?[12](?!\d)": ("phi",),
    "stablelm": ("stablelm", "gpt_neox"),
}
_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION = (*_QKV, "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_FUSED_ATTENTION = ("qkv_proj", "o_proj")
_PLAIN_MLP = ("up_proj", "down_proj")
_ONE_NORM = ("input_layernorm", "", "", "")
FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
# A part of each head may be rotated.
_PARTIAL: Fields = {"rope_reads": ("partial_rotary_factor",)}
# Layer norms, and a feed-forward without a gate.
_PLAIN: Fields = {"norm": "layer", "gated": False}
# The same with one matrix for queries, keys and values.
_FUSED: Fields = {**_PLAIN, "fused": ("qkv_proj",)}
_OLMO: Fields = {"norms": ("", FOUR_NORMS[1], "", FOUR_NORMS[3]), "qk_norm": "all"}
_DENSE_MLP = {"mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h"}


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


def _check(hf: Any, **expected: Any) -> None:
    """Raise a ValueError for a field with another value than the only one that is implemented."""
    for name, value in expected.items():
        if getattr(hf, name) != value:
            raise ValueError(f"{name} is {getattr(hf, name)}: expected {value}")


def windows(hf: Any) -> Fields:
    """Return the windows of the layers that the config lists, or of all layers."""
    if not (window := getattr(hf, "sliding_window", None)):
        return {}
    kinds = (
        getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    )
    return {
        "window": window,
        "sliding": tuple(kind == "sliding_attention" for kind in kinds),
    }


def _qwen2(hf: Any) -> Fields:
    return windows(hf) | {"biased": _QKV}


def _qwen3(hf: Any) -> Fields:
    return windows(hf) | {"qk_norm": "head"}


def _gemma(hf: Any) -> Fields:
    return {"norm_offset": 1.0, "embedding_scale": hf.hidden_size**0.5}


def _gemma2(hf: Any) -> Fields:
    return {
        **_gemma(hf),
        **windows(hf),
        "activation": hf.hidden_activation,
        "norms": FOUR_NORMS,
        "attention_cap": hf.attn_logit_softcapping or 0.0,
        "logit_cap": hf.final_logit_softcapping or 0.0,
        "query_scale": hf.query_pre_attn_scalar**-0.5,
    }


def _gemma3(hf: Any) -> Fields:
    _check(hf, attn_logit_softcapping=None)
    return _gemma2(hf) | {"qk_norm": "head"}


def _phi3(hf: Any) -> Fields:
    fields = {**_PARTIAL, "fused": ("qkv_proj", "gate_up_proj")}
    if hf.sliding_window:
        # All layers have the window, whatever the config lists.
        fields["window"] = hf.sliding_window
        fields["sliding"] = (True,) * hf.num_hidden_layers
    return fields


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
    fields = {
        **_granite(hf),
        "d_ff": hf.shared_intermediate_size,
        "fused": ("gate_up_proj",),
        "renamed": {
            "mlp.gate_up_proj": "shared_mlp.input_linear",
            "mlp.down_proj": "shared_mlp.output_linear",
        },
    }
    if hf.position_embedding_type != "rope":
        fields["rope"] = _unrotated(hf)
    return fields


def _smollm3(hf: Any) -> Fields:
    # Layers without rotary positions are those that may have a window.
    sliding = tuple(
        not rotated for rotated in hf.no_rope_layers[: hf.num_hidden_layers]
    )
    window = (hf.sliding_window or 0) if hf.use_sliding_window else 0
    if window and sliding != windows(hf)["sliding"]:
        raise ValueError(
            "layer_types and no_rope_layers differ: expected windows in layers without rotary positions"
        )
    return {"window": window, "sliding": sliding, "local_rope": _unrotated(hf)}


def _gpt2(hf: Any) -> Fields:
    _check(
        hf,
        add_cross_attention=False,
        scale_attn_by_inverse_layer_idx=False,
        scale_attn_weights=True,
    )
    return {
        **_FUSED,
        "d_ff": hf.n_inner or 4 * hf.hidden_size,
        "num_kv_heads": hf.num_attention_heads,
        "rope": _unrotated(hf),
        "learned_positions": True,
        "biased": (*_FUSED_ATTENTION, *_PLAIN_MLP),
        "norms": ("ln_1", "", "ln_2", ""),
        "conv1d": True,
        "stem": "transformer",
        "renamed": {
            "embed_tokens": "wte",
            "layers": "h",
            "norm": "ln_f",
            "self_attn.qkv_proj": "attn.c_attn",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
    }


def _gpt_neox(hf: Any) -> Fields:
    attention = _FUSED_ATTENTION if hf.attention_bias else ()
    return {
        **_FUSED,
        **_PARTIAL,
        "num_kv_heads": hf.num_attention_heads,
        "parallel": hf.use_parallel_residual,
        "fused_by_head": True,
        "biased": (*attention, *_PLAIN_MLP),
        "stem": "gpt_neox",
        "renamed": {
            "embed_tokens": "embed_in",
            "norm": "final_layer_norm",
            "lm_head": "embed_out",
            "self_attn.qkv_proj": "attention.query_key_value",
            "self_attn.o_proj": "attention.dense",
            **_DENSE_MLP,
        },
    }


def _falcon(hf: Any) -> Fields:
    _check(hf, alibi=False)
    if hf.new_decoder_architecture:
        kv_heads = hf.num_kv_heads
        single = hf.num_ln_in_parallel_attn == 1
        norms = _ONE_NORM if single else ("ln_attn", "", "ln_mlp", "")
    else:
        kv_heads = 1 if hf.multi_query else hf.num_attention_heads
        norms = _ONE_NORM if hf.parallel_attn else DecoderConfig.norms
    return {
        **_FUSED,
        "d_ff": hf.ffn_hidden_size,
        "num_kv_heads": kv_heads,
        "parallel": hf.new_decoder_architecture or hf.parallel_attn,
        "fused_by_head": True,
        "biased": (*_FUSED_ATTENTION, *_PLAIN_MLP) if hf.bias else (),
        "norms": norms,
        "stem": "transformer",
        "renamed": {
            "embed_tokens": "word_embeddings",
            "layers": "h",
            "norm": "ln_f",
            "self_attn.qkv_proj": "self_attention.query_key_value",
            "self_attn.o_proj": "self_attention.dense",
            **_DENSE_MLP,
        },
    }


def _phi(hf: Any) -> Fields:
    _check(hf, qk_layernorm=False)
    return {
        **_PLAIN,
        **_PARTIAL,
        "parallel": True,
        "biased": (*_ATTENTION, *_MLP, "lm_head"),
        "norms": _ONE_NORM,
        "renamed": {
            "norm": "final_layernorm",
            "self_attn.o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        },
    }


def _stablelm(hf: Any) -> Fields:
    _check(hf, qk_layernorm=False)
    parallel = hf.use_parallel_residual
    return {
        **_PARTIAL,
        "norm": "layer",
        "parallel": parallel,
        "norms": _ONE_NORM if parallel else DecoderConfig.norms,
        "biased": _QKV if hf.use_qkv_bias else (),
    }


def _hunyuan(hf: Any) -> Fields:
    return {
        "rope_reads": ("alpha",),
        "qk_norm": "rotated",
        "renamed": {
            "self_attn.q_norm": "self_attn.query_layernorm",
            "self_attn.k_norm": "self_attn.key_layernorm",
        },
    }


def _internlm(hf: Any) -> Fields:
    context = hf.max_position_embeddings
    return {
        "biased": _ATTENTION if getattr(hf, "bias", True) else (),
        "rope": Rope(width=head_width(hf), scaling="dynamic", context=context),
    }


# Models whose config is that of another family, some with parts that are left out.
ALIASES = {"llava_llama": "llama", "llava_mistral": "mistral", "internlm": "llama"}
# Models for images and text, which are read for text alone, and the module that is their text model, one of `FAMILIES`.
WITH_IMAGES = dict.fromkeys(
    ("gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "llava"),
    "language_model",
)
WITH_IMAGES |= dict.fromkeys(("idefics3", "smolvlm"), "text_model")
FAMILIES: dict[str, Callable[[Any], Fields]] = {
    # It ignores a window, such as that of a Mistral whose weights it has.
    "llama": lambda hf: {},
    "mistral": windows,
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
    "ministral": windows,
    "ministral3": lambda hf: windows(hf) | {"rope_reads": ("llama_4_scaling_beta",)},
    "smollm3": _smollm3,
    "olmo2": lambda hf: _OLMO,
    "olmo3": lambda hf: _OLMO | windows(hf),
    "hunyuan_v1_dense": _hunyuan,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "phi": _phi,
    "stablelm": _stablelm,
    "internlm": _internlm,
}
