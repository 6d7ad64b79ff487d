"""`lorafusion params`: how many numbers each method trains on a base model, without any weights."""

import dataclasses
import math
from pathlib import Path

import jax
from flax import nnx

from .io.hf import read_config
from .models.sites import Site, sites
from .models.t5 import T5, T5Config


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
    found = counts(_config(options.shape), options)
    full = found["full fine-tuning"]
    print(f"| method | trainable numbers | of {options.shape} |\n|---|---:|---:|")
    for method, count in found.items():
        print(f"| {method} | {count:,} | {100 * count / full:.4g} % |")


def counts(config: T5Config, options: ParamsOptions) -> dict[str, int]:
    """Return how many numbers each method trains.

    LoRAFusion's coefficients are one for each module and block; magnitudes are one for each column of an adapted
    matrix, as DoRA's. VeRA trains two vectors a matrix, of its rank and of d_out (PEFT counts the same).

    Args:
      config: the base model.
      options: all but its shape.

    Raises:
      ValueError: a count below one, or a target that the model does not have.
    """
    for name in ("adapters", "rank", "vera_rank"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}: wanted at least 1")
    adapted = _adapted(config, options.targets)
    matrices = [site for site in adapted.values() for _ in range(site.layers)]
    blocks = sum({name.partition(".")[0]: site.layers for name, site in adapted.items()}.values())
    coefficients = options.adapters * blocks
    magnitudes = sum(site.d_out for site in matrices)
    lora = sum(options.rank * (site.d_in + site.d_out) for site in matrices)
    return {
        "LoRAFusion": coefficients + magnitudes,
        "LoRAFusion, coefficients only": coefficients,
        "LoRAFusion, magnitudes only": magnitudes,
        f"LoRA, rank {options.rank}": lora,
        f"DoRA, rank {options.rank}": lora + magnitudes,
        f"VeRA, rank {options.vera_rank}": sum(options.vera_rank + site.d_out for site in matrices),
        "LoraHub": options.adapters,
        "full fine-tuning": _size(config),
    }


def _config(shape: str) -> T5Config:
    if shape in SHAPES:
        return SHAPES[shape]
    if "/" not in shape and not Path(shape).exists():
        raise ValueError(
            f"no shape {shape!r}: choose one of {', '.join(SHAPES)}, or give the folder or hub id of a base model"
        )
    config = read_config(shape)
    # transformers 5 writes that FLAN's head is tied, which it is not. In every T5 a tied head has scaled logits.
    return dataclasses.replace(config, tied=config.tied and config.scale_logits)


def _adapted(config: T5Config, targets: tuple[str, ...]) -> dict[str, Site]:
    there = dict.fromkeys(name.rpartition(".")[2] for name in sites(config))
    if not targets or set(targets) - there.keys():
        raise ValueError(f"targets are {' '.join(targets) or 'none'}: choose of {' '.join(there)}, such as q v")
    return {name: site for name, site in sites(config).items() if name.rpartition(".")[2] in targets}


def _size(config: T5Config) -> int:
    model = nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
