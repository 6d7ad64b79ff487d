"""`lorafusion crossbar explore`: comparison of configurations of arrays for a base model, on text.

OUT/rows.jsonl    measured values, which the same command does not measure again
OUT/best.yaml     the configuration that is named
OUT/prepared-...  the base prepared for it, where it needs that
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .. import crossbar
from ..crossbar.exploration import LEAST_BATCHES
from ..loading.model import LoadedModel
from ..models.architecture import matrices, sharing_inputs
from ..support.options import BaseOptions, DigitalOptions, OutOptions
from ..tasks import IGNORED, Batch
from ..training.loss import log_likelihood
from .prepare import PrepareOptions, prepare, weights_in_arrays, with_changes
from .program import program
from .texts import (
    LINES,
    WINDOW,
    load_base,
    logits_of_base,
    no_padding,
    read_batches,
    read_texts,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExploreOptions(DigitalOptions, OutOptions, BaseOptions):
    """Find the cheapest arrays on which a base model loses at most so much.

    Loss and cost of all combinations of some fields of a configuration are predicted, and the cheapest are simulated on
    other text. The same command continues where it was interrupted. Exit status 1: none of them loses so little.

    Examples:
      lorafusion crossbar explore --base base --text page.txt --device mine.yaml --loss 0.05 --out explored
      lorafusion crossbar explore --base base --text page.txt --vary cell.bits=2221,322,7 adc.bits=4,5,6 --out explored

    Attributes:
      text: text files; a causal model reads windows of 128 tokens, another one answers each line.
      tokens: tokens of the text that a causal model reads; a third each to measure, to choose and to confirm.
      device: a preset, or a .yaml or .json file with all fields that are not varied; by default the cells of the preset
        neurram. Bases are prepared unless its `mapping` has some of clip, factors and transform.
      vary: fields and their values, as in adc.bits=4,5,6; bits of cells are listed least significant first.
      loss: nats above the digital base, for each token.
      minutes: time after which nothing more is measured.
      out: folder of results.
    """

    text: tuple[Path, ...]
    tokens: int = 6144
    device: str | None = None
    vary: tuple[str, ...] = ()
    loss: float = 0.05
    minutes: float | None = None


def explore(options: ExploreOptions, macs: float = 0.0) -> crossbar.Exploration:
    """Return the comparison that options describe; `macs` are a token's multiply-adds that are always digital.

    Raises:
      ValueError: before anything is written: a field does not exist, a value is not valid, a converter has no energy,
        or the text is too short.
    """
    if not options.loss > 0:
        raise ValueError(f"loss is {options.loss}: give nats above 0")
    if options.device is None:
        neurram = crossbar.PRESETS["neurram"]
        base = crossbar.CrossbarConfig(
            cell=crossbar.Cell(on_off_ratio=neurram.cell.on_off_ratio),
            device=neurram.device,
        )
    else:
        base = crossbar.load_config(options.device)
    base = with_changes(base)
    vary = crossbar.parse_vary(options.vary) or crossbar.usual_variations(base)
    grid = crossbar.grid(base, vary)
    content = read_texts(options.text)
    loaded = load_base(options.base)
    batches = read_batches(loaded, content, options.tokens)
    if len(batches) < LEAST_BATCHES:
        if loaded.config.causal:
            unit = f"windows of {WINDOW} tokens"
        else:
            unit = f"batches of {LINES} lines"
        raise ValueError(
            f"the text has {len(batches)} {unit}: give at least {LEAST_BATCHES}, better 48: a third each to "
            "measure, to choose and to confirm"
        )
    return crossbar.Exploration(
        _subject(loaded, batches, options, macs),
        batches,
        grid,
        file=options.out / "rows.jsonl",
        minutes=options.minutes,
    )


def save_best(options: ExploreOptions, config: crossbar.CrossbarConfig) -> Path:
    """Write the configuration, and the base that is prepared for it; return what `--crossbar` takes."""
    best = options.out / "best.yaml"
    crossbar.save_config(config, best)
    if not crossbar.needs_preparation(config):
        return best
    folder = options.out / f"prepared-{crossbar.config_hash(config)[:12]}"
    if not folder.exists():
        prepare(
            PrepareOptions(
                base=options.base,
                crossbar=str(best),
                text=options.text,
                keep_digital=options.keep_digital,
                out=folder,
            )
        )
    return folder


def _subject(
    loaded: LoadedModel, batches: list[Batch], options: ExploreOptions, macs: float
) -> crossbar.Subject:
    graph = loaded.problem.graph
    frozen = loaded.problem.frozen
    sites = loaded.config.sites
    weights = weights_in_arrays(loaded, options.keep_digital)
    # A generated token reads matrices of its own tokens once, and has its share of the reads of a source.
    source = sum(int(jnp.sum(batch.input_mask)) for batch in batches)
    target = sum(int(jnp.sum(batch.labels != IGNORED)) for batch in batches)
    products = {}
    for name, weight in matrices(nnx.merge(graph, frozen.base)).items():
        vectors = 1
        if name in sites:
            vectors = sites[name].layers
            if "target" not in sites[name].reads:
                vectors *= max(1, round(source / target))
        if name in weights:
            products[name] = vectors
        else:
            macs += vectors * math.prod(weight.shape[-2:])

    def place(
        rules: crossbar.Rules, key: Array, preparations: Any
    ) -> tuple[Any, nnx.State]:
        prepared = dataclasses.replace(frozen, preparations=preparations or None)
        return _losses_of_base(graph), program(graph, prepared, rules, key).base

    return crossbar.Subject(
        weights=weights,
        together=sharing_inputs(sites, weights),
        products=products,
        place=place,
        counted=no_padding(loaded),
        macs=macs,
    )


@functools.lru_cache  # the same function again: it is compiled once for each
def _losses_of_base(graph: nnx.GraphDef) -> Any:
    """Return the base's mean loss over the labels of a batch, as a function of its weights and the batch."""
    logits_of = logits_of_base(graph)

    def run(base: nnx.State, batch: Batch) -> Float[Array, ""]:
        likelihood = log_likelihood(logits_of(base, batch), batch.labels)
        tokens = jnp.sum(batch.labels != IGNORED).astype(likelihood.dtype)
        return -jnp.sum(likelihood) / tokens

    return run
