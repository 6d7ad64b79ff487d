"""`lorafusion export`: a fused run as a PEFT adapter or a merged base model, or one adapter of a pool as it was."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from ..fusion.coefficients import expand
from ..io.export import fused_adapter, lora_adapter, merged_base
from ..io.hf import save_base
from ..io.peft import resave, write_adapter
from ..io.pool import read_adapter_from_pool
from .apply import check_modules
from .baselines.lora import LoRA
from .methods import Fusion
from .run import load_run
from .setup import load_fused


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a fused run in the hub's formats, or an adapter of a converted pool as it came.

    Examples:
      lorafusion export --run runs/snarks-fusion --seed 1 --out adapter
      lorafusion export --run runs/snarks-fusion --seed 1 --format merged --out model
      lorafusion export --pool pool --adapter flan_t5_large-super_glue_wic --out adapter

    Attributes:
      out: the folder to write, which must not exist.
      run: folder of the run.
      seed: which of the run's seeds; by default its first.
      format: a PEFT adapter, or a Hugging Face base model with the fusion merged in.
      pool: a converted pool, to save one of its adapters again.
      adapter: the name of that adapter.
    """

    out: Path
    run: Path | None = None
    seed: int | None = None
    format: Literal["adapter", "merged"] = "adapter"
    pool: Path | None = None
    adapter: str | None = None


def export(options: ExportOptions) -> None:
    """Write what the options ask for.

    Raises:
      ValueError: `out` exists, or the options do not say what to write.
    """
    if options.out.exists():
        raise ValueError(f"{options.out} exists: give a new folder with --out, or remove it first")
    if options.run is not None and options.pool is None:
        _export_run(options, options.run)
    elif options.pool is not None and options.adapter is not None and options.run is None:
        resave(read_adapter_from_pool(options.pool, options.adapter), options.out)
    else:
        raise ValueError("say what to export: --run RUN, or --pool POOL --adapter NAME")


def _export_run(options: ExportOptions, folder: Path) -> None:
    fused, params, config = load_run(folder)
    if fused.method == "zero-shot":
        raise ValueError(f"{folder} trained nothing: there is no adapter to export")
    seed = fused.seeds[0] if options.seed is None else options.seed
    if seed not in fused.seeds:
        raise ValueError(f"{folder} has no seed {seed}: it has {', '.join(map(str, fused.seeds))}")
    loaded = load_fused(fused)
    check_modules(loaded, fused, config)
    position = fused.seeds.index(seed)
    of_seed: dict[str, Any] = jax.tree.map(lambda p: p[position], params)
    index = loaded.index[position]
    if options.format == "merged" or isinstance(loaded.method, LoRA):
        adapters, _ = jax.jit(loaded.method.adapters)(of_seed, loaded.frozen, index)
        if options.format == "merged":
            model = nnx.merge(loaded.graph, loaded.frozen.base)
            save_base(merged_base(model, adapters), options.out, fused.base)
        else:
            write_adapter(options.out, *lora_adapter(adapters, base=fused.base))
        return
    assert isinstance(loaded.method, Fusion) and loaded.frozen.pool is not None
    exported = fused_adapter(
        loaded.frozen.pool,
        index,
        expand(of_seed["coefficients"], loaded.frozen.pool, loaded.method.granularity),
        loaded.method.composition,
        base=fused.base,
        magnitudes=of_seed.get("magnitudes"),
    )
    write_adapter(options.out, *exported)
