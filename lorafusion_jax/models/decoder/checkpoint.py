"""Layout of a decoder-only model in Hugging Face's files."""

from ..architecture import Checkpoint, Slot
from .model import Decoder

_EMBEDDING = "model.embed_tokens.weight"


def _others(model: Decoder) -> list[Slot]:
    """Return the slots of the embedding, of the norms and of the biases."""
    block, config = model.decoder, model.structure
    names = {"input_layernorm": block.input_norm}
    if config.post_norms:
        names |= {
            "post_attention_layernorm": block.attention_post_norm,
            "pre_feedforward_layernorm": block.mlp_norm,
            "post_feedforward_layernorm": block.mlp_post_norm,
        }
    else:
        names["post_attention_layernorm"] = block.mlp_norm
    if config.qk_norm:
        names |= {"self_attn.q_norm": block.self_attn.q_norm, "self_attn.k_norm": block.self_attn.k_norm}
    layers = range(config.num_layers)
    slots = [Slot(model.embedding, [_EMBEDDING]), Slot(model.norm.scale, ["model.norm.weight"])]
    slots += [
        Slot(norm.scale, [f"model.layers.{i}.{name}.weight" for i in layers], stacked=True)
        for name, norm in names.items()
    ]
    for name, site in config.sites.items():
        _, module, last = name.split(".")
        if last in config.biased:
            bias = getattr(getattr(block, module), last).bias
            slots.append(Slot(bias, [f"{site.path_of(i)}.bias" for i in layers], stacked=True))
    return slots


CHECKPOINT = Checkpoint(
    embedding=_EMBEDDING,
    head="lm_head.weight",
    # Early Llama checkpoints hold the frequencies of the rotary positions.
    unused=("model.layers.*.self_attn.rotary_emb.inv_freq",),
    others=_others,
)
