"""The structure of a Llama, Mistral, Qwen, Gemma or Phi-3 from its Hugging Face config.

transformers' config classes fill in missing fields, and bring older files' fields to today's names.
"""

import contextlib
import dataclasses
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Required, TypedDict

import msgspec

from ...support.reading import structured
from ...support.text import shown
from ..architecture import Layers, Size
from .config import DecoderConfig, Rope

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
# A Mistral is often published as a Llama, also in every GGUF file. Names of tools are not those of models.
NAMES = {
    r"(?<!o)llama(?!.?(factory|cpp))|smollm": ("llama",),
    "mistral": ("mistral", "llama"),
    "qwen": ("qwen2", "qwen3"),
    "gemma": ("gemma2", "gemma3_text"),
}

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_SCALINGS = ("default", "linear", "dynamic", "llama3")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
# Fields whose values only describe how a file was made, or that need PyTorch to be read.
_IGNORED = ("model_type", "torch_dtype", "dtype", "quantization_config")

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class _Json(TypedDict, total=False):
    """Fields of a config.json whose values transformers uses before it checks them, or not at all."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    max_position_embeddings: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None
    head_dim: Size | None
    sliding_window: int | None
    layer_types: list[str] | None
    hidden_act: str
    hidden_activation: str | None
    query_pre_attn_scalar: _Positive
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    quantization_config: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None
    rope_parameters: dict[str, Any] | None


class _Complete(TypedDict, total=False):
    """A config.json with all fields that are used, in their newest meaning: transformers would change nothing."""

    model_type: Required[Literal["llama"]]
    vocab_size: Required[Size]
    hidden_size: Required[Size]
    intermediate_size: Required[Size]
    max_position_embeddings: Required[Size]
    num_hidden_layers: Required[Layers]
    num_attention_heads: Required[Size]
    num_key_value_heads: Required[Size]
    head_dim: Required[Size]
    hidden_act: Required[str]
    rms_norm_eps: Required[_Positive]
    rope_theta: Required[_Positive]
    rope_scaling: None
    rope_parameters: None
    partial_rotary_factor: None
    tie_word_embeddings: Required[bool]
    attention_bias: Required[bool]
    mlp_bias: Required[bool]
    eos_token_id: Required[int | list[int] | None]
    pad_token_id: Required[int | None]


class _RopeJson(TypedDict, total=False):
    rope_type: str
    rope_theta: Required[_Positive]
    partial_rotary_factor: Annotated[float, msgspec.Meta(ge=0, le=1)]
    factor: _Positive
    original_max_position_embeddings: Size
    low_freq_factor: _Positive
    high_freq_factor: _Positive


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Return the structure that a config.json describes, as transformers 4 and 5 write it.

    Raises a ValueError that names a value which does not fit, or needs something that the decoder lacks.
    """
    structured(raw, _Json, "", own=False)
    kind = raw["model_type"]
    if raw.get("quantization"):
        fix = "give the unquantised model, whose name often lacks only -4bit (its README names it as base_model)"
        raise ValueError(f"the weights are quantised by MLX (quantization is {shown(raw['quantization'])}): {fix}")
    if raw.get("quantization_config") and raw["quantization_config"].get("quant_method") != "gguf":
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"the weights are quantised by {method}: give the unquantised model, or a GGUF file of it")
    hf = _filled(kind, raw)
    gemma = kind in ("gemma2", "gemma3_text")
    activation = hf.hidden_activation if gemma else hf.hidden_act
    if activation not in _ACTIVATIONS:
        raise ValueError(f"the activation is {shown(activation)}: expected {' or '.join(_ACTIVATIONS)}")
    if getattr(hf, "use_bidirectional_attention", False):
        raise ValueError("use_bidirectional_attention is set: expected a causal language model")
    if kind == "gemma3_text" and hf.attn_logit_softcapping:
        raise ValueError(f"attn_logit_softcapping is {hf.attn_logit_softcapping} in a Gemma 3: expected none")
    d_head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    if hf.num_attention_heads % hf.num_key_value_heads:
        heads, multiple = hf.num_attention_heads, hf.num_key_value_heads
        raise ValueError(f"num_attention_heads is {heads}: expected a multiple of num_key_value_heads, {multiple}")
    # Some versions of transformers keep the fields of all layers next to those of each kind.
    ropes = hf.rope_parameters if "full_attention" in hf.rope_parameters else {"full_attention": hf.rope_parameters}
    ends = tuple(hf.eos_token_id) if isinstance(hf.eos_token_id, list | tuple) else (hf.eos_token_id,)
    if ends in ((), (None,)):
        raise ValueError("eos_token_id is missing: expected the token, or tokens, that end an answer")
    local = ropes.get("sliding_attention")
    # A Llama ignores a window, such as that of a Mistral whose weights it has.
    window = 0 if kind == "llama" else hf.sliding_window or 0
    config = DecoderConfig(
        model_type=kind,
        vocab_size=hf.vocab_size,
        d_model=hf.hidden_size,
        context=hf.max_position_embeddings,
        d_head=d_head,
        d_ff=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        num_layers=hf.num_hidden_layers,
        eps=hf.rms_norm_eps,
        rope=_rope(kind, ropes["full_attention"], d_head, hf.max_position_embeddings),
        local_rope=_rope(kind, local, d_head, hf.max_position_embeddings) if local is not None else None,
        window=window,
        sliding=_sliding(kind, hf, window),
        activation=_ACTIVATIONS[activation],
        fused=kind == "phi3",
        biased=_biased(kind, hf),
        qk_norm=kind in ("qwen3", "gemma3_text"),
        post_norms=gemma,
        norm_offset=1.0 if gemma else 0.0,
        query_scale=(hf.query_pre_attn_scalar if gemma else d_head) ** -0.5,
        embedding_scale=hf.hidden_size**0.5 if gemma else 1.0,
        attention_cap=(hf.attn_logit_softcapping or 0.0) if kind == "gemma2" else 0.0,
        logit_cap=(hf.final_logit_softcapping or 0.0) if gemma else 0.0,
        tied=hf.tie_word_embeddings,
        # Many models have no token for padding, written as null or -1. It is masked by its place: any token will do.
        pad_id=ends[0] if hf.pad_token_id is None or hf.pad_token_id < 0 else hf.pad_token_id,
        eos_id=ends,
    )
    return structured(dataclasses.asdict(config), DecoderConfig, "")


def _filled(kind: str, raw: Mapping[str, Any]) -> Any:
    """Return the config as transformers completes and checks it, without loading transformers for a complete one."""
    with contextlib.suppress(ValueError):
        whole = structured(dict(raw), _Complete, "", own=False)
        if whole["hidden_size"] % whole["num_attention_heads"] == 0:
            return types.SimpleNamespace(**dict(raw) | {"rope_parameters": {"rope_theta": whole["rope_theta"]}})
    from transformers import AutoConfig
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings quote the file as it is, and what they warn of is refused here
    try:
        return AutoConfig.for_model(kind, **{k: v for k, v in raw.items() if k not in _IGNORED})
    except Exception as error:  # its checks raise errors of several libraries
        raise ValueError(f"transformers rejects this config of a {kind}: {error}: fetch it again") from error
    finally:
        logging.set_verbosity(verbosity)


def _rope(kind: str, fields: Mapping[str, Any], d_head: int, context: int) -> Rope:
    fields = structured(dict(fields), _RopeJson, "", own=False)
    scaling = fields.get("rope_type", "default")
    if scaling not in _SCALINGS:
        fix = f"expected {', '.join(_SCALINGS)}"
        raise ValueError(f"the rope scaling is {shown(scaling)}, which is not implemented: {fix}")
    return Rope(
        theta=float(fields["rope_theta"]),
        # Only a Phi-3 reads the factor.
        width=int(d_head * fields.get("partial_rotary_factor", 1.0)) if kind == "phi3" else d_head,
        scaling=scaling,
        factor=float(fields.get("factor", 1.0)),
        context=fields.get("original_max_position_embeddings", context) if scaling == "llama3" else context,
        low_freq=float(fields.get("low_freq_factor", 1.0)),
        high_freq=float(fields.get("high_freq_factor", 4.0)),
    )


def _sliding(kind: str, hf: Any, window: int) -> tuple[bool, ...]:
    """Return which layers have a sliding window: all of a Phi-3 and, unless its config lists them, of a Mistral."""
    if not window:
        return ()
    kinds = None if kind == "phi3" else getattr(hf, "layer_types", None)
    return tuple(each == "sliding_attention" for each in kinds or ["sliding_attention"] * hf.num_hidden_layers)


def _biased(kind: str, hf: Any) -> tuple[str, ...]:
    if kind == "qwen2":
        return _ATTENTION[:3]
    attention = _ATTENTION if getattr(hf, "attention_bias", False) else ()
    return (*attention, *(_MLP if getattr(hf, "mlp_bias", False) else ()))
