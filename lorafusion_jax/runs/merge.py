"""`lorafusion merge`: combine modules of a pool with the user's own weights, without a task."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp

from ..adapters.coefficients import expand
from ..adapters.composition import compose
from ..io.digests import Digests, pool_digests
from ..io.export import fused_adapter, merged_base
from ..io.folders import new_folder
from ..io.hf import open_base
from ..io.pool import open_pool
from ..support.writing import write_text
from .export import MERGED, Format, check_format, put_as, put_merged
from .weight_list import RECORD, Merged, check_modules, coefficients_of, typed_weights


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
        raise ValueError(
            f"{options.out} exists: give a new folder with --out, or remove it first"
        )
    base = open_base(options.base)
    check_format(options.format, base)
    weights = typed_weights(options.weights, options.weights_file)
    stored = open_pool(options.pool, base)
    check_modules(weights, stored.names, options.pool)
    pool = stored.load(list(weights))
    coefficients = expand(coefficients_of(weights, pool, options.pool), pool, "block")
    index = jnp.arange(len(pool))
    with new_folder(options.out) as partial:
        if options.format in MERGED:
            adapters, _ = compose(pool, index, coefficients, "sum")
            put_merged(
                partial,
                options.format,
                base,
                merged_base(base.load(hashed=True), adapters),
            )
        else:
            adapter = fused_adapter(
                base.config, pool, index, coefficients, "sum", base=options.base
            )
            put_as(partial, options.format, base, *adapter)
        digests: Digests = {"base": base.digest, "modules": pool_digests(pool).modules}
        write_text(
            partial / RECORD,
            json.dumps(Merged(weights=weights, digests=digests), indent=1) + "\n",
        )
    return f"{len(weights)} modules of {options.pool}"
