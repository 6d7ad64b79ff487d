"""Layout of a T5 in Hugging Face's files."""

from ..architecture import Checkpoint, Slot
from .model import T5

_SHARED = "shared.weight"


def _others(model: T5) -> list[Slot]:
    """Return the slots of the embedding, of the tables of relative biases and of the norms."""
    slots = [Slot(model.embedding, [_SHARED])]
    for stack, block, bias, norm in (
        ("encoder", model.encoder, model.encoder_bias, model.encoder_norm),
        ("decoder", model.decoder, model.decoder_bias, model.decoder_norm),
    ):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        slots.append(Slot(bias.table, [table]))
        slots.append(Slot(norm.scale, [f"{stack}.final_layer_norm.weight"]))
        norms = ("self_norm", "ff_norm") if stack == "encoder" else ("self_norm", "cross_norm", "ff_norm")
        for sublayer, name in enumerate(norms):
            scale = getattr(block, name).scale
            names = [f"{stack}.block.{i}.layer.{sublayer}.layer_norm.weight" for i in range(scale.shape[0])]
            slots.append(Slot(scale, names, stacked=True))
    return slots


CHECKPOINT = Checkpoint(
    embedding=_SHARED,
    head="lm_head.weight",
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    # T5 1.0 was published with a table that no layer reads.
    unused=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    others=_others,
)
