"""`lorafusion merge`: combine modules of a pool with the user's own weights, without a task."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..adapters.coefficients import column_names, expand
from ..adapters.composition import compose
from ..adapters.pool import LoraPool
from ..files import read_json, shown, some
from ..io.export import fused_adapter, merged_base
from ..io.folders import new_folder
from ..io.hf import load_base, read_config
from ..io.pool import open_pool
from .export import MERGED, Format, check_format, put_as, put_merged

Weights = Mapping[str, float | Mapping[str, float]]
"""Weight of every module, or its weights by block, named STACK.LAYER."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Combine modules of a pool with your own weights: dW = sum of weight times B A.

    Examples:
      lorafusion merge --base base --pool pool --weights sort_dash=0.7 dropfirst_dash=-0.3 --out merged
      lorafusion merge --base base --pool pool --weights-file weights.json --out model --format merged

    Attributes:
      base: the base model: a Hugging Face folder, a hub id or a GGUF file.
      pool: a converted pool, or a folder of PEFT adapter folders.
      out: folder to write, which must not exist.
      weights: weights of modules, as name=number.
      weights_file: JSON file of weights by module: a number, or numbers by block as in {"name": {"STACK.LAYER": 0.5}};
        blocks that are left out get zero.
      format: format of the result, as in `lorafusion export`.
    """

    base: str
    pool: str
    out: Path
    weights: tuple[str, ...] = ()
    weights_file: Path | None = None
    format: Format = "adapter"


def merge(options: MergeOptions) -> str:
    """Write the combination, and return a description of it.

    Raises:
      ValueError: `out` exists, or a weight is not a number of a module of the pool.
    """
    if options.out.exists():
        raise ValueError(f"{options.out} exists: give a new folder with --out, or remove it first")
    check_format(options.format, options.base)
    weights = _weights(options)
    stored, config = open_pool(options.pool, options.base), read_config(options.base)
    if unknown := [name for name in weights if name not in stored.names]:
        raise ValueError(f"{options.pool} has no module {some(unknown)}: it has {some(stored.names)}")
    pool = stored.load(list(weights))
    if pool.magnitude is not None:
        raise ValueError(
            f"{options.pool} is a DoRA adapter, whose magnitudes a weighted sum would lose: use plain LoRAs"
        )
    coefficients = expand(coefficients_of(weights, pool), pool, "block")
    index = jnp.arange(len(pool))
    with new_folder(options.out) as partial:
        if options.format in MERGED:
            adapters, _ = compose(pool, index, coefficients, "sum")
            put_merged(partial, options.format, options.base, merged_base(load_base(options.base), adapters))
        else:
            adapter = fused_adapter(config, pool, index, coefficients, "sum", base=options.base)
            put_as(partial, options.format, options.base, *adapter)
    return f"{len(weights)} modules of {options.pool}"


def coefficients_of(weights: Weights, pool: LoraPool) -> Float[Array, "N blocks"]:
    """Return the coefficients of every module of a pool by block.

    Raises:
      ValueError: a weight is not a finite number, or a block is not the pool's.
    """
    blocks = column_names(pool, "block")
    found = np.zeros((len(pool), len(blocks)), np.float32)
    for row, name in enumerate(pool.names):
        of_module = weights[name]
        by_block = of_module if isinstance(of_module, Mapping) else dict.fromkeys(blocks, of_module)
        for block, weight in by_block.items():
            if block not in blocks:
                raise ValueError(f"the weights of {name} name a block {shown(block)}: expected one of {some(blocks)}")
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name} is {shown(weight)}: expected a finite number")
            found[row, blocks.index(block)] = weight
    return jnp.asarray(found)


def _weights(options: MergeOptions) -> Weights:
    weights: dict[str, float | dict[str, float]] = {}
    if options.weights_file is not None:
        weights |= read_json(options.weights_file, dict[str, float | dict[str, float]], "weights by module", own=False)
    for text in options.weights:
        name, _, number = text.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise ValueError(f"--weights {shown(text)}: expected name=number, such as sort_dash=0.7") from None
    if not weights:
        raise ValueError("no weights: give some with --weights name=0.7 or --weights-file")
    return weights
