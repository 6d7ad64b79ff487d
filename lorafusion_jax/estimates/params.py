"""`lorafusion params`: how many numbers each method trains on a base model, without any weights."""

import dataclasses
from pathlib import Path

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamsOptions:
    """Print how many numbers each method trains, exactly and without loading weights.

    Example:
      lorafusion params --shape flan-t5-large --adapters 20 --rank 16

    Attributes:
      shape: a name, such as flan-t5-large, or the folder or hub id of a base model, of which config.json is read.
      adapters: how many modules are fused.
      rank: of LoRA and DoRA.
      vera_rank: of VeRA, whose two random matrices all sites share.
      targets: the linear maps that are adapted, wherever they occur: of q k v o wi wi_0 wi_1 wo.
    """

    shape: str = "flan-t5-large"
    adapters: int = 20
    rank: int = 16
    vera_rank: int = 128
    targets: tuple[str, ...] = ("q", "v")


def params(options: ParamsOptions) -> None:
    """Print the counts as a Markdown table.

    Raises:
      ValueError: as `counts` and `read_config` do; a shape that is neither a known name, a folder nor a hub id.
    """
    found = counts(shape_config(options.shape), options)
    full = found["full fine-tuning"]
    print(f"| method | trainable numbers | of {options.shape} |\n|---|---:|---:|")
    for method, count in found.items():
        print(f"| {method} | {count:,} | {100 * count / full:.4g} % |")


def counts(config: T5Config, options: ParamsOptions) -> dict[str, int]:
    """Return how many numbers each method trains.

    LoRAFusion's coefficients are one for each module and block.

    Args:
      config: the base model.
      options: all but its shape.

    Raises:
      ValueError: a count below one, or a target that the model does not have.
    """
    for name in ("adapters", "rank", "vera_rank"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}: wanted at least 1")
    found = trainable(targeted(config, options.targets), rank=options.rank, vera_rank=options.vera_rank)
    coefficients = options.adapters * found.blocks
    return {
        "LoRAFusion": coefficients + found.magnitudes,
        "LoRAFusion, coefficients only": coefficients,
        "LoRAFusion, magnitudes only": found.magnitudes,
        f"LoRA, rank {options.rank}": found.lora,
        f"DoRA, rank {options.rank}": found.lora + found.magnitudes,
        f"VeRA, rank {options.vera_rank}": found.vera,
        "LoraHub": options.adapters,
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
