"""`lorafusion merge`: combine modules of a pool with the user's own weights, without a task."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from ..adapters.coefficients import expand
from ..io.digests import Digests, pool_digests
from ..io.export import fused_adapter, merged_base
from ..io.folders import new_folder
from ..io.hf import open_base
from ..io.pool import open_pool
from ..methods.fusion import Fusion
from ..models.architecture import kernels
from ..support.options import FormatOptions, PoolOptions
from ..support.writing import write_text
from ..training.frozen import Frozen
from .export import (
    MERGED,
    adapter_export,
    check_format,
    merged_export,
    put_export,
)
from .weight_list import RECORD, Merged, check_modules, coefficients_of, typed_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions(FormatOptions, PoolOptions):
    """Combine modules of a pool with your own weights: dW = sum of weight times B A. A DoRA adapter is combined alone.

    Examples:
      lorafusion merge --base base --pool pool --weights sort_dash=0.7 dropfirst_dash=-0.3 --out merged
      lorafusion merge --base base --pool pool --weights-file weights.json --out model --format merged

    Attributes:
      weights: weights of modules, as name=number.
      weights_file: JSON file of weights by module: a number, or numbers by block as in {"name": {"STACK.LAYER": 0.5}};
        blocks that are left out get zero.
    """

    weights: tuple[str, ...] = ()
    weights_file: Path | None = None


def merge(options: MergeOptions) -> str:
    """Write the combination, and return a description of it.

    Raises:
      ValueError: `out` exists, a weight is not a number of a module of the pool, or the result is not finite.
    """
    if options.out.exists():
        raise ValueError(
            f"{options.out} exists: give a new folder with --out, or remove it first"
        )
    base = open_base(options.base)
    check_format(options.format, base, options.dtype)
    weights = typed_weights(options.weights, options.weights_file)
    stored = open_pool(options.pool, base)
    check_modules(weights, stored.names, options.pool)
    pool = stored.load(list(weights))
    coefficients = coefficients_of(weights, pool)
    index = jnp.arange(len(pool))
    if options.format in MERGED:
        model = base.load(hashed=True)
        fusion = Fusion(magnitudes=False)
        frozen = fusion.precompute(Frozen(nnx.state(model), pool), kernels(model))
        adapters, _ = fusion.adapters({"coefficients": coefficients}, frozen, index)
        result = merged_export(merged_base(model, adapters), base, options.dtype)
    else:
        spread = expand(coefficients, pool, "block")
        adapter = fused_adapter(
            base.config, pool, index, spread, "sum", base=options.base
        )
        result = adapter_export(*adapter, options.dtype)
    with new_folder(options.out) as partial:
        put_export(partial, options.format, base, result)
        digests: Digests = {"base": base.digest, "modules": pool_digests(pool).modules}
        write_text(
            partial / RECORD,
            json.dumps(Merged(weights=weights, digests=digests), indent=1) + "\n",
        )
    return f"{len(weights)} modules of {options.pool}"
