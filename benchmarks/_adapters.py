"""Random PEFT adapters of a base model's shape on disk: what loading and converting are measured on."""

import os
from pathlib import Path

import numpy as np
from _model import RANK

from lorafusion_jax import Architecture
from lorafusion_jax.io import write_adapter
from lorafusion_jax.models import family_of, linear_shapes

_DIFFERENT = 20


def write_adapters(folder: Path, config: Architecture, count: int) -> list[Path]:
    """Write adapters of rank 16 on q and v, float32: 20 different ones, and hard links to their files beyond."""
    rng = np.random.default_rng(0)
    sources = []
    said = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(config.targets),
    }
    said |= {"task_type": family_of(config).task_type, "inference_mode": True}
    for n in range(count):
        sources.append(source := folder / f"adapter_{n:03d}")
        if n >= _DIFFERENT:
            source.mkdir()
            for file in sources[n % _DIFFERENT].iterdir():
                os.link(file, source / file.name)
            continue
        tensors = {}
        for path, (d_in, d_out) in linear_shapes(config).items():
            if path.rpartition(".")[2] in config.targets:
                key = f"base_model.model.{path}.lora_"
                tensors[f"{key}A.weight"] = rng.normal(
                    scale=0.02, size=(RANK, d_in)
                ).astype(np.float32)
                tensors[f"{key}B.weight"] = rng.normal(
                    scale=0.02, size=(d_out, RANK)
                ).astype(np.float32)
        write_adapter(source, said, tensors)
    return sources
