"""The structure of a decoder-only model from its Hugging Face config; `families.py` has what sets each family apart.

transformers' config classes fill in missing fields, and bring older files' fields to today's names.
"""

import contextlib
import copy
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Required, TypedDict

import msgspec

from ...support.reading import decode_as
from ..architecture import Layers, Size
from .config import DecoderConfig
from .families import ALIASES, FAMILIES, WITH_IMAGES, Fields, biased, head_width
from .hf_rope import rope_of

_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
# Names of one field in different families.
_ACTIVATION_FIELDS = ("hidden_act", "activation_function", "activation")
_EPS_FIELDS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
# Fields whose values only describe how a file was made, that need PyTorch to be read, or that are of parts which are
# left out.
_IGNORED = (
    "torch_dtype",
    "dtype",
    "quantization_config",
    "vision_config",
    "time_step_limit",
)

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
    n_embd: Size
    n_head: Size
    n_inner: Size | None
    n_layer: Layers
    n_positions: Size
    sliding_window: int | None
    layer_types: list[str] | None
    hidden_act: str
    hidden_activation: str | None
    query_pre_attn_scalar: _Positive
    embedding_multiplier: _Positive
    attention_multiplier: _Positive
    residual_multiplier: _Positive
    logits_scaling: _Positive
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    quantization_config: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None
    rope_parameters: dict[str, Any] | None
    text_config: dict[str, Any] | None


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


def read_config(
    raw: Mapping[str, Any],
    families: Mapping[str, Callable[[Any], Fields]] = FAMILIES,
    structure: type[DecoderConfig] = DecoderConfig,
) -> DecoderConfig:
    """Return the structure that a config.json describes, as transformers 4 and 5 write it.

    `families` give the fields of `structure` that set a family apart. Raises a ValueError that names a value which does
    not fit, or needs something that the decoder lacks.
    """
    decode_as(raw, _Json, "", allow_unknown=True)
    decode_as(raw.get("text_config") or {}, _Json, "", allow_unknown=True)
    kind = raw["model_type"]
    if raw.get("quantization"):
        fix = "give the unquantised model, whose name often lacks only -4bit (its README names it as base_model)"
        raise ValueError(
            f"the weights are quantised by MLX (quantization is {raw['quantization']!r}): {fix}"
        )
    if (
        raw.get("quantization_config")
        and raw["quantization_config"].get("quant_method") != "gguf"
    ):
        method = raw["quantization_config"].get("quant_method", "unknown")
        fix = "give the unquantised model, or a GGUF file of it"
        if method == "bitsandbytes":
            fix = (
                "give the unquantised model, usually the one whose name lacks -bnb-4bit or -unsloth-bnb-4bit; "
                "--load-in nf4 loads it in 4 bits"
            )
        raise ValueError(f"the weights are quantised by {method}: {fix}")
    full_config = _filled(ALIASES.get(kind) or kind, raw)
    # A model for images and text has the config of a text model inside.
    if isinstance(full_config, types.SimpleNamespace):
        hf = full_config
    else:
        hf = full_config.get_text_config()
    # A Gemma 4 has heads of two widths.
    hf.allow_global_per_layer_attribute_access = True
    if hf.model_type not in families:
        got = f"the text model of this {kind} is {hf.model_type!r}"
        raise ValueError(f"{got}: expected one of {', '.join(families)}")
    # Between the tokens of an image alone, if it is "vision".
    if getattr(hf, "use_bidirectional_attention", False) not in (False, None, "vision"):
        raise ValueError(
            "use_bidirectional_attention is set: expected a causal language model"
        )
    if not (d_head := head_width(hf)):
        raise ValueError(
            f"hidden_size is {hf.hidden_size}: expected at least {hf.num_attention_heads}, one for each head"
        )
    # A GPT-2's function gives what its config lacks.
    heads = hf.num_attention_heads
    kv_heads = getattr(hf, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads is {heads}: expected a multiple of num_key_value_heads, {kv_heads}"
        )
    ropes: dict[str, Any] = getattr(hf, "rope_parameters", {"rope_theta": 10_000.0})
    # Some versions of transformers keep the fields of all layers next to those of each kind.
    if "full_attention" not in ropes:
        ropes = {"full_attention": ropes}
    end = raw.get("eos_token_id", getattr(hf, "eos_token_id", None))
    pad = raw.get("pad_token_id", getattr(hf, "pad_token_id", None))
    ends = tuple(end) if isinstance(end, list | tuple) else (end,)
    if ends in ((), (None,)):
        raise ValueError(
            "eos_token_id is missing: expected the token, or tokens, that end an answer"
        )
    local = ropes.get("sliding_attention")
    fields = dict(families[kind if kind in families else hf.model_type](hf))
    context = hf.max_position_embeddings
    activation = fields.pop("activation", _first(hf, _ACTIVATION_FIELDS))
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"the activation is {activation!r}: expected {' or '.join(_ACTIVATIONS)}"
        )
    reads = fields.pop("rope_reads", ())
    fields["renamed"] = tuple(fields.get("renamed", {}).items())
    config = DecoderConfig(
        model_type=kind,
        stem="model"
        if hf is full_config
        else f"model.{WITH_IMAGES.get(kind, 'language_model')}",
        vocab_size=hf.vocab_size,
        d_model=hf.hidden_size,
        context=context,
        d_head=d_head,
        d_ff=getattr(hf, "intermediate_size", 0),
        num_heads=heads,
        num_kv_heads=kv_heads,
        num_layers=hf.num_hidden_layers,
        eps=_first(hf, _EPS_FIELDS),
        rope=rope_of(ropes["full_attention"], d_head, context, reads=reads),
        local_rope=rope_of(local, d_head, context, reads=reads)
        if local is not None
        else None,
        activation=_ACTIVATIONS[activation],
        biased=biased(hf),
        query_scale=d_head**-0.5,
        tied=full_config.tie_word_embeddings,
        # Many models have no token for padding, written as null or -1. It is masked by its place: any token will do.
        pad_id=ends[0] if pad is None or pad < 0 else pad,
        eos_id=ends,
    )
    return decode_as(
        dataclasses.asdict(structure(**vars(config) | fields)), structure, ""
    )


def _first(hf: Any, names: Sequence[str]) -> Any:
    """Return the first of these fields that the config has, or None."""
    return next((getattr(hf, name) for name in names if hasattr(hf, name)), None)


def _filled(kind: str, raw: Mapping[str, Any]) -> Any:
    """Return the config as transformers completes and checks it, without loading transformers for a complete one."""
    with contextlib.suppress(ValueError):
        complete = decode_as(dict(raw), _Complete, "", allow_unknown=True)
        if complete["hidden_size"] % complete["num_attention_heads"] == 0:
            return types.SimpleNamespace(
                **dict(raw)
                | {"rope_parameters": {"rope_theta": complete["rope_theta"]}}
            )
    from transformers import AutoConfig
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings quote the file as it is, and what they warn of is refused here
    try:
        # transformers adds fields to those of the rope.
        fields = copy.deepcopy(
            {k: v for k, v in raw.items() if k not in (*_IGNORED, "model_type")}
        )
        if fields.get("text_config"):
            fields["text_config"] = {
                k: v for k, v in fields["text_config"].items() if k not in _IGNORED
            }
        return AutoConfig.for_model(kind, **fields)
    except Exception as error:  # its checks raise errors of several libraries
        raise ValueError(
            f"transformers rejects this config of a {kind}: {error}: fetch it again"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
