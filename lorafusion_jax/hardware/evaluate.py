"""`lorafusion evaluate --crossbar`: a run on several chips, at several ages, in one program."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..adapters.norms import gram
from ..adapters.pool import LoraPool
from ..checks import at_least
from ..crossbar import CrossbarConfig, ReadNoise
from ..crossbar.chip.program import is_random
from ..io.checkpoint import write_json
from ..methods.lora import LoRA
from ..methods.method import Fusion, Params
from ..models.architecture import kernels
from ..models.weights import Weight
from ..runs.apply import EvaluateOptions, load_to_evaluate
from ..runs.evaluate import evaluate
from ..runs.options import OnArrays
from ..runs.prepare import Setup
from ..training.progress import progress
from .calibration import looped
from .folder import aged, load_chips
from .lanes import for_every_chip, on_every_chip
from .program import Norms
from .setup import check, module_numbers, without_merged_pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOnChipsOptions(EvaluateOptions):
    """Evaluate a fused run, on its own task or another one, digitally or on simulated chips.

    Examples:
      lorafusion evaluate --run runs/snarks-fusion --task bbh/ruin_names.json
      lorafusion evaluate --run runs/snarks-fusion --crossbar chips/noisy --age 1s 1h 1day 1month 1year
      lorafusion evaluate --run runs/snarks-fusion --crossbar noisy.yaml --chips 8 --adc-bits 6 --read-noise 0.01

    Attributes:
      crossbar: a folder that `lorafusion crossbar program` wrote, a preset, or a .yaml or .json file.
      chips: how many of them; by default all of a folder, one of a configuration.
      chip_key: from which the chips of a preset or file are drawn; a folder has its own.
      digital: patterns of weights that stay digital; a folder has its own.
      age: of the chips: seconds, or as in 1h, 1day, 1month, 1year; several are evaluated one after the other.
      compensate: undo each matrix's mean drift digitally: `on`, `off`, or `both` beside each other; by default as the
        configuration says.
      read_noise: standard deviation of Gmax, in place of the configuration's.
      adc_bits: in place of the configuration's.
      norm: the magnitudes' norms are those of the `ideal` weights, or of the weights as `programmed`, read back.
      lora_in: a LoRA baseline's module sits in `sram` beside the arrays, or is written into `cells` for its task.
    """

    crossbar: str | None = None
    chips: int | None = None
    chip_key: int = 0
    digital: tuple[str, ...] = ()
    age: tuple[str, ...] = ()
    compensate: Literal["on", "off", "both"] | None = None
    read_noise: float | None = None
    adc_bits: int | None = None
    norm: Norms = OnArrays.norm
    lora_in: Literal["sram", "cells"] = "sram"

    def check_digital(self) -> None:
        """Raise ValueError for options of chips without any."""
        of_chips = [f for f in dataclasses.fields(self) if f.name not in EvaluateOptions.__dataclass_fields__]
        if given := [f.name for f in of_chips if getattr(self, f.name) != f.default]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{flags}: of chips, and there are none: say which with --crossbar, or leave it out")


def evaluate_on_chips(options: EvaluateOnChipsOptions) -> dict[str, Any]:
    """Return and write what a run says on every chip, at every age.

    Raises:
      ValueError: chips that hold other weights, an age without a drift model, a LoRA that is none.
    """
    assert options.crossbar is not None
    at_least(1, chips=options.chips)
    chips = load_chips(options.crossbar, key=options.chip_key, digital=options.digital)
    config = _overridden(chips.config, options)
    cases = _cases(options)
    configs = [aged(config, age, compensate=compensate) for age, compensate in cases]
    count = options.chips or chips.count or 1
    if count > 1 and not is_random(config) and not config.reads_at_random:
        raise ValueError(f"nothing in {options.crossbar} is random, so {count} chips are all alike: one is enough")
    keys = jnp.stack([chips.chip_key(number) for number in range(count)])
    setup, fused, params = load_to_evaluate(options)
    check(setup, fused)
    chips.check(setup)
    numbers = module_numbers(setup, fused, chips)
    if options.lora_in == "cells":
        setup, params = lora_in_cells(setup, params)
        numbers = None
    setup = looped(without_merged_pool(setup))
    rows = []
    with progress("chips", count * len(cases)) as bar:
        for (age, compensate), of_age in zip(cases, configs, strict=True):
            rules = chips.rules(of_age)
            on_all = on_every_chip(setup, params, rules, keys, modules=numbers, norm=options.norm)
            everyone = for_every_chip(params, count)
            found = evaluate(on_all, everyone, on_all.index, batch_size=options.eval_batch)
            matches = found.exact_match.reshape(count, -1)
            losses = np.asarray(found.loss, float).reshape(count, -1)
            rows += [
                {
                    "age": age,
                    "compensate": compensate,
                    "chip": chip,
                    "seed": seed,
                    "exact_match": matches[chip, s].item(),
                    "loss": losses[chip, s].item(),
                }
                for chip in range(count)
                for s, seed in enumerate(fused.seeds)
            ]
            bar.update(count)
    results = {
        "task": setup.task.name,
        "method": fused.method,
        "crossbar": options.crossbar,
        "chips": count,
        "read_noise": options.read_noise,
        "adc_bits": options.adc_bits,
        "norm": options.norm,
        "lora_in": options.lora_in if fused.method == "lora" else None,
        "rows": rows,
    }
    write_json(results_path(options), results)
    return results


def results_path(options: EvaluateOnChipsOptions) -> Path:
    """Return the file that an evaluation on chips writes."""
    return options.run / f"chips-{Path(options.crossbar or '').stem}.json"


def lora_in_cells(setup: Setup, params: Params) -> tuple[Setup, Params]:
    """Return a trained LoRA as a pool of its own, one module a seed, so that it is programmed as modules are.

    Raises:
      ValueError: the run trained no LoRA.
    """
    method = setup.method
    if not isinstance(method, LoRA) or method.dora:
        raise ValueError("the run trained no LoRA that could be written into cells: leave out --lora-in cells")
    A: dict[str, Weight] = {site: jnp.moveaxis(a, 0, 1) for site, a in params["lora"]["A"].items()}
    scale = method.alpha / method.rank
    B: dict[str, Weight] = {site: jnp.moveaxis(b, 0, 1) * scale for site, b in params["lora"]["B"].items()}
    seeds = setup.index.shape[0]
    pool = LoraPool(
        A=A,
        B=B,
        rank={site: jnp.full(weight.shape[:2], method.rank, jnp.int32) for site, weight in A.items()},
        names=tuple(f"seed {seed}" for seed in range(seeds)),
    )
    as_it_is = Fusion(composition="sum", granularity="global", magnitudes=False)
    index = jnp.arange(seeds)[:, None]
    used = {site: kernel for site, kernel in kernels(nnx.merge(setup.graph, setup.frozen.base)).items() if site in A}
    frozen = dataclasses.replace(setup.frozen, pool=pool, gram=jax.jit(gram)(pool, used))
    return dataclasses.replace(setup, frozen=frozen, method=as_it_is, index=index), {
        "coefficients": jnp.ones((seeds, 1))
    }


def _cases(options: EvaluateOnChipsOptions) -> list[tuple[str | None, bool | None]]:
    choices: dict[str | None, tuple[bool | None, ...]] = {
        None: (None,),
        "on": (True,),
        "off": (False,),
        "both": (False, True),
    }
    return [(age, compensate) for age in options.age or (None,) for compensate in choices[options.compensate]]


def _overridden(config: CrossbarConfig, options: EvaluateOnChipsOptions) -> CrossbarConfig:
    """Return the configuration with what is read otherwise."""
    if options.read_noise is not None:
        noise = ReadNoise(options.read_noise) if options.read_noise else None
        config = dataclasses.replace(config, device=dataclasses.replace(config.device, read_noise=noise))
    if options.adc_bits is not None:
        if config.adc is None:
            raise ValueError(f"{options.crossbar} has no ADC to give {options.adc_bits} bits: leave out --adc-bits")
        config = dataclasses.replace(config, adc=dataclasses.replace(config.adc, bits=options.adc_bits))
    return config
