"""`lorafusion export`: a fused run as a PEFT adapter or a merged base, one adapter of a pool, or a base as a folder."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..adapters.coefficients import expand
from ..adapters.pool import LoraPool
from ..adapters.updates import LowRank, Rescaled, WeightDecomposed
from ..io.digests import Digests, pool_digests
from ..io.export import fused_adapter, lora_adapter, merged_base
from ..io.gguf.write import write_lora, write_merged
from ..io.hf import Base, hf_tensors, open_base, put_base, save_base
from ..io.peft.adapter import put_adapter, resave
from ..io.pool import ConvertedPool, open_pool
from ..io.source import is_hub_id, split_revision
from ..loading.model import load_model
from ..methods.fusion import Fusion
from ..models.architecture import Model, kernels
from ..models.registry import gguf_layout
from ..support.checks import flags_given
from ..support.options import (
    AnyBaseOptions,
    Dtype,
    Format,
    FormatOptions,
    PoolOptions,
    RunSeedOptions,
)
from ..support.text import printable
from ..support.text_tables import escaped
from ..support.version import __version__
from ..support.writing import new_folder, write_text
from ..training.method import Frozen, Params
from ..training.problem import Problem
from .folder import RunFolder, RunResults, load_seed
from .options import FuseOptions
from .setup import of_run
from .weight_list import RECORD, Merged, check_modules, coefficients_of, typed_weights

MERGED: tuple[Format, ...] = ("merged", "gguf-f16", "gguf-q8_0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(FormatOptions, RunSeedOptions, AnyBaseOptions):
    """Write a fused run in the hub's formats, an adapter of a converted pool as it came, or a GGUF file as a folder.

    Examples:
      lorafusion export --run runs/snarks-fusion --seed 1 --out adapter
      lorafusion export --run runs/snarks-fusion --seed 1 --format merged --out model
      lorafusion export --pool pool --adapter flan_t5_large-super_glue_wic --out adapter
      lorafusion export --base model.gguf --out model

    Attributes:
      base: base model, to write as a Hugging Face folder in float32: PEFT can train adapters on the one of a GGUF file.
      pool: converted pool, to save one of its adapters again.
      adapter: name of that adapter.
    """

    pool: Path | None = None
    adapter: str | None = None


def export(options: ExportOptions) -> str:
    """Write the export, and return a description of it; ValueError if `out` exists or the options do not fit."""
    if options.out.exists():
        raise ValueError(
            f"{options.out} exists: give a new folder with --out, or remove it first"
        )
    sources = (options.run, options.pool, options.base)
    if sources.count(None) != 2 or (options.pool is None) != (options.adapter is None):
        raise ValueError(
            "nothing to export: give one of --run RUN, --pool POOL --adapter NAME, and --base BASE"
        )
    if options.run is None and (
        flags := flags_given(options, ("seed", "format", "dtype"))
    ):
        fix = "`lorafusion merge` writes modules of a pool in other formats"
        raise ValueError(
            f"{flags}: only for a run, because an adapter of a pool is saved as it came: {fix}"
        )
    if options.run is not None:
        return _export_run(options, options.run)
    if options.base is not None:
        base = open_base(options.base)
        save_base(base.load(), options.out, base)
        return f"base {options.base}"
    assert options.pool is not None and options.adapter is not None
    resave(ConvertedPool(options.pool).adapter(options.adapter), options.out)
    return f"adapter {options.adapter} of {options.pool}"


def _export_run(options: ExportOptions, folder: Path) -> str:
    fused, params, config, place = load_seed(folder, options.seed)
    seed = fused.seeds[place]
    method = fused.entry
    if method.learns == "untrained":
        raise ValueError(
            f"{folder} is of the method {fused.method}, which trains nothing: export another run"
        )
    merged = options.format in MERGED
    if "base" in method.groups and not merged:
        raise ValueError(
            f"{folder} fine-tuned all weights, not an adapter: export it with --format merged"
        )
    base = open_base(fused.base)
    check_format(options.format, base, options.dtype)
    loaded = of_run(load_model(fused, base=base), fused, folder, config, params)
    problem = loaded.problem.replace(index=loaded.problem.index[place])
    card = _card(options, fused, seed, RunFolder(folder).results())
    if merged:
        model, adapters, _ = problem.adapted_model(params)
        made = merged_base(model, adapters)
    else:
        # As it was given, because an absolute path would contain folders of this machine.
        made = _adapter(problem, params, config["options"].base)
    _write(options, base, made, {"README.md": card})
    return f"seed {seed} of {folder}, {fused.method}"


def _card(
    options: ExportOptions, fused: FuseOptions, seed: int, results: RunResults | None
) -> str:
    """Return a model card: names of files without their folders, which are private, and as text."""
    from huggingface_hub import ModelCard, ModelCardData

    def text(source: str) -> str:
        return escaped(printable(source if is_hub_id(source) else Path(source).name))

    merged = options.format in MERGED
    library = "transformers" if merged else "peft"
    base = fused.base  # the hub refuses a base that is no hub id
    data = ModelCardData(
        base_model=split_revision(base)[0] if is_hub_id(base) else None,
        library_name="gguf" if options.format.startswith("gguf") else library,
        tags=["lorafusion"] if merged else ["lorafusion", "lora"],
    )
    control = "" if fused.control == "none" else f", the control `{fused.control}`"
    lines = [
        f"# {text(fused.task)}, by {fused.method}",
        f"Made of {text(base)} by lorafusion-jax {__version__}, with the method `{fused.method}`{control} and the seed "
        f"{seed}, from at most {fused.train_rows:,} rows of {text(fused.task)}.",
    ]
    for row in [] if results is None else results.seeds:
        if row["seed"] == seed and results and row["exact_match"] is not None:
            rows = f"{results.test_rows:,} test rows"
            lines.append(f"Exact match on {rows}: {row['exact_match']:.1f} %.")
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines)))


def check_format(format: Format, base: Base, dtype: Dtype | None) -> None:
    """Raise a ValueError if a format cannot hold what is made of a base, or has no choice of a dtype."""
    if not format.startswith("gguf"):
        return
    if dtype is not None:
        raise ValueError(
            f"--dtype {dtype}: a GGUF adapter is float32, and merged models are gguf-f16 or gguf-q8_0: leave it out"
        )
    gguf_layout(base.raw.get("model_type"), "model_type")


def _write(
    options: FormatOptions,
    base: Base,
    made: Model | tuple[Mapping[str, Any], Mapping[str, np.ndarray]],
    files: Mapping[str, str],
) -> None:
    """Write a merged model, or the fields and the tensors of an adapter, in a format and dtype, and files of text.

    Raises a ValueError, before anything is written, if a tensor is not finite in the dtype.
    """
    fields = None
    if isinstance(made, tuple):
        fields, exact = made
        with np.errstate(over="ignore"):
            tensors = {
                name: tensor.astype(options.dtype or tensor.dtype)
                for name, tensor in exact.items()
            }
    else:
        tensors = hf_tensors(made, base, options.dtype)
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(
                f"{name} has NaN or infinite numbers in {tensor.dtype}: export a run or seed that did not diverge, "
                "smaller weights, or --dtype float32"
            )
    with new_folder(options.out) as folder:
        if fields is None and options.format == "merged":
            put_base(tensors, folder, base)
        elif fields is None:
            kind = "F16" if options.format == "gguf-f16" else "Q8_0"
            write_merged(folder / "model.gguf", base.files, tensors, kind)
        elif options.format == "adapter":
            put_adapter(folder, fields, tensors)
        else:
            _write_gguf_lora(folder, base, fields, tensors)
        for name, text in files.items():
            write_text(folder / name, text)


def _write_gguf_lora(
    folder: Path,
    base: Base,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> None:
    if fields["use_dora"]:
        raise ValueError(
            "a GGUF LoRA has no magnitudes: use --format gguf-f16 or gguf-q8_0, which merge them"
        )
    if base.config.tied and any(".lm_head." in name for name in tensors):
        raise ValueError(
            "a GGUF LoRA cannot change a tied head: use --format gguf-f16 or gguf-q8_0, which give it a matrix"
        )
    alpha = fields["lora_alpha"]
    # llama.cpp multiplies B A by alpha / r with each matrix's own r; PEFT's alpha_pattern makes that 1.
    scaled = {
        name: tensor * (tensor.shape[1] / alpha) if ".lora_B." in name else tensor
        for name, tensor in tensors.items()
    }
    write_lora(folder / "adapter.gguf", base.raw, scaled, float(alpha))


def _adapter(
    problem: Problem, params: Params, base: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the configuration and the tensors of the PEFT adapter that equals one seed's parameters."""
    magnitudes = params.get("magnitudes")
    frozen = problem.frozen
    config = problem.config
    fusion = problem.method.as_fusion(params, frozen, problem.index)
    if fusion is not None and isinstance(frozen.pool, LoraPool):
        return fused_adapter(
            config,
            frozen.pool,
            problem.index,
            *fusion,
            base=base,
            magnitudes=magnitudes,
        )
    adapters, _ = jax.jit(problem.method.adapters)(params, frozen, problem.index)
    if magnitudes is not None and all(
        isinstance(update, Rescaled) for update in adapters.values()
    ):
        adapted = {
            name: site for name, site in config.adaptable.items() if name in magnitudes
        }
        adapters = {  # PEFT has magnitudes only next to an update: here one of rank 1 that is zero
            name: LowRank(
                jnp.zeros((site.layers, site.d_in, 1)),
                jnp.zeros((site.layers, 1, site.d_out)),
            )
            for name, site in adapted.items()
        }
    if unsupported := [
        update
        for update in adapters.values()
        if not isinstance(update, LowRank | WeightDecomposed)
    ]:
        method = type(problem.method).__name__
        kind = type(unsupported[0]).__name__
        raise ValueError(
            f"{method} makes updates of the kind {kind}, which PEFT lacks: export with --format merged"
        )
    return lora_adapter(config, adapters, base=base, magnitudes=magnitudes)


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
        frozen = fusion.precompute(
            Frozen(nnx.state(model), pool), kernels(model, pool.sites)
        )
        adapters, _ = fusion.adapters({"coefficients": coefficients}, frozen, index)
        made = merged_base(model, adapters)
    else:
        spread = expand(coefficients, pool, "block")
        made = fused_adapter(base.config, pool, index, spread, "sum", base=options.base)
    digests: Digests = {"base": base.digest, "modules": pool_digests(pool).modules}
    record = json.dumps(Merged(weights=weights, digests=digests), indent=1) + "\n"
    _write(options, base, made, {RECORD: record})
    return f"{len(weights)} modules of {options.pool}"
