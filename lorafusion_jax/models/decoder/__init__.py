"""Decoder-only models: Llama, SmolLM, Mistral, Qwen 2 to 3, Gemma, Phi-3, Granite, OLMo, Hunyuan."""

import re
from operator import attrgetter

from ..architecture import Checkpoint, Family, Slot
from .config import DecoderConfig, Rope
from .families import ALIASES, FAMILIES, NAMES, WITH_IMAGES
from .gguf import GGUF
from .hf_config import read_config
from .model import Decoder

__all__ = ["FAMILY", "Decoder", "DecoderConfig"]

# The parts that read images, in files of several versions of transformers.
_IMAGES = (
    "visual.*",
    "vision_tower.*",
    "vision_model.*",
    "multi_modal_projector.*",
    "mm_projector.*",
    "connector.*",
)
# Modules of tunix's decoders, where one kernel may hold several linear maps.
_TUNIX_MODULE = re.compile(r"(?:model\.)?layers\.(\d+)\.(attn|mlp)\.(\w+)")
_TUNIX_PARTS = {"attn": "self_attn", "mlp": "mlp"}
_TUNIX_MAPS = {
    "q_einsum": ("q_proj",),
    "kv_einsum": ("k_proj", "v_proj"),
    "qkv_einsum": ("q_proj", "k_proj", "v_proj"),
    "attn_vec_einsum": ("o_proj",),
}


def _others(model: Decoder) -> list[Slot]:
    block = model.decoder
    config = model.structure
    stem = config.stem
    renamed = dict(config.renamed)
    norms = (
        block.input_norm,
        block.attention_post_norm,
        block.mlp_norm,
        block.mlp_post_norm,
    )
    modules = {
        name: norm for name, norm in zip(config.norms, norms, strict=True) if name
    }
    if config.qk_norm:
        modules["self_attn.q_norm"] = block.self_attn.q_norm
        modules["self_attn.k_norm"] = block.self_attn.k_norm
    variables = {
        f"{renamed.get(name, name)}.weight": norm.scale
        for name, norm in modules.items()
    }
    for site in config.sites:
        name = site.partition(".")[2]
        if site.rpartition(".")[2] in config.biased:
            bias = attrgetter(name)(block).bias
            variables[f"{renamed.get(name, name)}.bias"] = bias
    slots = [
        Slot(model.embedding, [f"{stem}.embed_tokens.weight"]),
        Slot(model.norm.scale, [f"{stem}.norm.weight"]),
    ]
    for name, variable in variables.items():
        names = [f"{stem}.layers.{layer}.{name}" for layer in range(config.num_layers)]
        slots.append(Slot(variable, names, stacked=True))
    return slots


def _checkpoint(config: DecoderConfig) -> Checkpoint:
    stem = config.stem
    return Checkpoint(
        embedding=f"{stem}.embed_tokens.weight",
        head="lm_head.weight",
        # Early Llama checkpoints hold the frequencies of the rotary positions.
        unused=("model.layers.*.self_attn.rotary_emb.inv_freq",),
        unread=()
        if stem == "model" and config.model_type not in ALIASES
        else (*_IMAGES, *(f"model.{name}" for name in _IMAGES)),
        others=_others,
    )


def _paths_in_tunix(module: str) -> tuple[str, ...]:
    """Return Hugging Face's paths of a module of tunix's, such as `layers.0.attn.kv_einsum`; none for other names."""
    match = _TUNIX_MODULE.fullmatch(module)
    if match is None:
        return ()
    layer, part, name = match.groups()
    return tuple(
        f"model.layers.{layer}.{_TUNIX_PARTS[part]}.{last}"
        for last in _TUNIX_MAPS.get(name, (name,))
    )


_SMOLLM2 = DecoderConfig(
    model_type="llama",
    vocab_size=49_152,
    d_model=576,
    d_ff=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    d_head=64,
    context=8_192,
    eps=1e-5,
    rope=Rope(theta=1e5, width=64, context=8_192),
    query_scale=64**-0.5,
    tied=True,
)

FAMILY = Family(
    name="decoder",
    members="Llama, Mistral, Ministral 3, Qwen2, Qwen3, Gemma 1 to 3 (text), Phi-3, Granite, SmolLM3, OLMo 2 or 3, "
    "Hunyuan, or a model for images with such a text model",
    model_types=(*FAMILIES, *WITH_IMAGES, *ALIASES),
    names=NAMES,
    config=DecoderConfig,
    read_config=read_config,
    model=Decoder,
    checkpoint=_checkpoint,
    gguf=GGUF,
    tunix=_paths_in_tunix,
    task_type="CAUSAL_LM",
    shapes={"smollm2-135m": _SMOLLM2},
)
