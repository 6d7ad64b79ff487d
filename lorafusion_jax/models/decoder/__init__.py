"""Decoder-only models: Llama, SmolLM, Mistral, Qwen 2 to 3, Gemma, Phi, Granite, OLMo, GPT-2 and others."""

import re
from collections.abc import Mapping
from operator import attrgetter

from ..architecture import Checkpoint, Family, Slot
from ..layers import Base, LayerNorm, RMSNorm
from .config import DecoderConfig, Rope
from .families import ALIASES, FAMILIES, NAMES, WITH_IMAGES
from .gguf import GGUF
from .hf_config import read_config
from .model import Block, Decoder

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


def slots_of_block(block: Block, config: DecoderConfig, layers: range) -> list[Slot]:
    """Return the slots of a stacked block's norms and biases, given the numbers of its layers in the model."""
    norms = (
        block.input_norm,
        block.attention_post_norm,
        block.mlp_norm,
        block.mlp_post_norm,
    )
    modules = {
        name: norm
        for name, norm in zip(config.norms, norms, strict=True)
        if norm is not None
    }
    if config.qk_norm:
        modules["self_attn.q_norm"] = block.self_attn.q_norm
        if "k_proj" not in config.absent:
            modules["self_attn.k_norm"] = block.self_attn.k_norm
    variables = {}
    for name, norm in modules.items():
        variables |= _of_norm(config.name_of(name), norm)
    for site in config.sites:
        name = site.partition(".")[2]
        if site.rpartition(".")[2] in config.biased:
            bias = attrgetter(name)(block).bias
            variables[f"{config.name_of(name)}.bias"] = bias
    return stacked_slots(variables, config, layers)


def stacked_slots(
    variables: Mapping[str, Base], config: DecoderConfig, layers: range
) -> list[Slot]:
    """Return the slots of variables that are stacked over these layers, by their names in a layer."""
    return [
        Slot(
            variable,
            [f"{config.blocks}.{layer}.{name}" for layer in layers],
            stacked=True,
        )
        for name, variable in variables.items()
    ]


def slots_of_model(model: Decoder) -> list[Slot]:
    """Return the slots of the embeddings and the last norm."""
    config = model.structure
    stem = config.stem
    slots = [Slot(model.embedding, [config.embedding])]
    if "lm_head" in config.biased:
        slots.append(Slot(model.head_bias, ["lm_head.bias"]))
    if config.learned_positions:
        slots.append(Slot(model.positions, [f"{stem}.wpe.weight"]))
    last_norm = _of_norm(f"{stem}.{config.name_of('norm')}", model.norm)
    return slots + [Slot(variable, [name]) for name, variable in last_norm.items()]


def _others(model: Decoder) -> list[Slot]:
    config = model.structure
    layers = range(config.num_layers)
    return slots_of_model(model) + slots_of_block(model.decoder, config, layers)


def _of_norm(name: str, norm: RMSNorm) -> dict[str, Base]:
    """Return the variables of a norm by their tensors' names."""
    variables = {f"{name}.weight": norm.scale}
    if isinstance(norm, LayerNorm):
        variables[f"{name}.bias"] = norm.bias
    return variables


def _checkpoint(config: DecoderConfig) -> Checkpoint:
    return Checkpoint(
        embedding=config.embedding,
        head=f"{config.name_of('lm_head')}.weight",
        # Early checkpoints hold the frequencies of the rotary positions, or the causal mask.
        unused=(
            "*.rotary_emb.inv_freq",
            "*.attn.bias",
            "*.attention.bias",
            "*.masked_bias",
        ),
        flipped=("*.h.*.c_*.weight",) if config.conv1d else (),
        unread=(*_IMAGES, *(f"model.{name}" for name in _IMAGES))
        if config.model_type in (*WITH_IMAGES, *ALIASES)
        else (),
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
    "Hunyuan, GPT-2, GPT-NeoX, Falcon, Phi 1 to 2, StableLM, InternLM, or a model for images with such a text model",
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
