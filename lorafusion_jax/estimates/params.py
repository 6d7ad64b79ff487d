"""How many numbers each method trains on a base model, without any weights; shapes of common models."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..checks import at_least
from ..io.hf import read_config
from ..models.sites import targeted
from ..models.t5.model import T5Config
from .parameters import size, trainable


def _shape(d_model: int, d_ff: int, heads: int, layers: int, *, flan: bool) -> T5Config:
    return T5Config(
        vocab_size=32128,
        d_model=d_model,
        d_kv=64,
        d_ff=d_ff,
        num_heads=heads,
        num_layers=layers,
        num_decoder_layers=layers,
        gated=flan,
        tied=not flan,
        scale_logits=not flan,
    )


SHAPES = {
    "flan-t5-small": _shape(512, 1024, 6, 8, flan=True),
    "flan-t5-base": _shape(768, 2048, 12, 12, flan=True),
    "flan-t5-large": _shape(1024, 2816, 16, 24, flan=True),
    "flan-t5-xl": _shape(2048, 5120, 32, 24, flan=True),
    "flan-t5-xxl": _shape(4096, 10240, 64, 24, flan=True),
    "t5-small": _shape(512, 2048, 8, 6, flan=False),
    "t5-base": _shape(768, 3072, 12, 12, flan=False),
    "t5-large": _shape(1024, 4096, 16, 24, flan=False),
}


def counts(
    config: T5Config,
    *,
    modules: int = 20,
    rank: int = 16,
    vera_rank: int = 128,
    targets: Sequence[str] = ("q", "v"),
) -> dict[str, int]:
    """Return how many numbers each method trains.

    LoRAFusion's coefficients are one for each module and block.

    Args:
      config: the base model.
      modules: that are fused.
      rank: of LoRA and DoRA.
      vera_rank: of VeRA, whose two random matrices all sites share.
      targets: the linear maps that are adapted.

    Raises:
      ValueError: a count below one, or a target that the model does not have.
    """
    at_least(1, modules=modules, rank=rank, vera_rank=vera_rank)
    found = trainable(targeted(config, targets), rank=rank, vera_rank=vera_rank)
    coefficients = modules * found.blocks
    return {
        "LoRAFusion": coefficients + found.magnitudes,
        "LoRAFusion, coefficients only": coefficients,
        "LoRAFusion, magnitudes only": found.magnitudes,
        f"LoRA, rank {rank}": found.lora,
        f"DoRA, rank {rank}": found.lora + found.magnitudes,
        f"VeRA, rank {vera_rank}": found.vera,
        "LoraHub": modules,
        "full fine-tuning": size(config),
    }


def shape_config(shape: str) -> T5Config:
    """Return the structure of a known shape, or of the base model in a folder or at a hub id.

    Raises:
      ValueError: a shape that is none of these; and as `read_config` does.
    """
    if shape in SHAPES:
        return SHAPES[shape]
    if "/" not in shape and not Path(shape).exists():
        raise ValueError(
            f"no shape {shape!r}: choose one of {', '.join(SHAPES)}, or give the folder or hub id of a base model"
        )
    config = read_config(shape)
    # transformers 5 writes that FLAN's head is tied, which it is not. In every T5 a tied head has scaled logits.
    return dataclasses.replace(config, tied=config.tied and config.scale_logits)
