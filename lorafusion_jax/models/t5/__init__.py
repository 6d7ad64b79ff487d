"""T5 1.0, T5 1.1, FLAN-T5 and mT5."""

from ..architecture import Checkpoint, Family, Slot
from .config import SHAPES, T5Config, read_config
from .model import T5

__all__ = ["FAMILY", "T5", "T5Config"]

_SHARED = "shared.weight"


def _others(model: T5) -> list[Slot]:
    slots = [Slot(model.embedding, [_SHARED])]
    for stack, block, bias, norm in (
        ("encoder", model.encoder, model.encoder_bias, model.encoder_norm),
        ("decoder", model.decoder, model.decoder_bias, model.decoder_norm),
    ):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        slots += [
            Slot(bias.table, [table]),
            Slot(norm.scale, [f"{stack}.final_layer_norm.weight"]),
        ]
        if stack == "encoder":
            norms = ("self_norm", "ff_norm")
        else:
            norms = ("self_norm", "cross_norm", "ff_norm")
        for sublayer, name in enumerate(norms):
            scale = getattr(block, name).scale
            names = [
                f"{stack}.block.{i}.layer.{sublayer}.layer_norm.weight"
                for i in range(scale.shape[0])
            ]
            slots.append(Slot(scale, names, stacked=True))
    return slots


FAMILY = Family(
    name="t5",
    members="T5 1.0, T5 1.1, FLAN-T5 or mT5",
    model_types=("t5", "mt5", "umt5"),
    names={
        r"(?<![a-z\d])(by|code)?t5(?!\d)": ("t5",),
        r"(?<![a-z\d])u?mt5(?!\d)": ("mt5", "umt5"),
    },
    config=T5Config,
    read_config=read_config,
    model=T5,
    checkpoint=lambda _: Checkpoint(
        embedding=_SHARED,
        head="lm_head.weight",
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        # T5 1.0 was published with a table that no layer reads.
        unused=(
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
        ),
        others=_others,
    ),
    task_type="SEQ_2_SEQ_LM",
    shapes=SHAPES,
)
