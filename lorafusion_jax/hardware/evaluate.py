"""A run on several chips, at several ages, in one program; and a report of one chip after another."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from ..adapters.norms import gram
from ..crossbar import (
    Chip,
    CrossbarConfig,
    ReadNoise,
    calibrate_tree,
    chips_in,
    config_hash,
    explain,
    is_random,
    observe,
    site_errors,
)
from ..loading.model import digests
from ..methods.fusion import PLAIN_SUM
from ..methods.lora import LoRA, as_pool
from ..models.architecture import kernels
from ..runs.evaluate import evaluate, evaluate_seeds, seed_rows
from ..runs.options import ChipsOptions, FuseOptions
from ..runs.predict import EvaluateOptions, load_to_evaluate
from ..runs.setup import Setup
from ..support.checks import at_least
from ..support.options import MeshOptions
from ..support.progress import progress
from ..support.writing import check_writable, write_json
from ..training.mesh import make_mesh, on_mesh
from ..training.method import Params
from .chip_file import Chips, aged, load_chips
from .chips import (
    CALIBRATION_ROWS,
    calibration_batches,
    for_every_chip,
    logits_of,
    on_every_chip,
)
from .on_arrays import check, module_numbers, without_merged_pool
from .program import Restored, check_no_split, program
from .restore import load_restored

_LONGEST_NAME = 40  # characters of the chips' name in that of a file
_COMPENSATE = {"on": True, "off": False, None: None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOnChipsOptions(MeshOptions, EvaluateOptions, ChipsOptions):
    """Evaluate a fused run, on its own task or another one, digitally or on simulated chips.

    Attributes:
      chips: number of chips; by default all chips of a file of chips, or one chip of a configuration.
      ages: ages of the chips: seconds, or as in 1h, 1day, 1month, 1year; several are evaluated one after the other.
      compensate: undo each matrix's mean drift digitally: `on` or `off`; by default as in the configuration.
      read_noise: standard deviation of the read noise as a share of Gmax, instead of the configuration's.
      adc_bits: bits of the ADC, instead of the configuration's.
      lora_in: where the module of a LoRA baseline is: in `sram` next to the arrays, or written into separate `cells`.
      calibration_rows: training rows that the ADCs are calibrated on.
      report: evaluate chip after chip, each calibrated on its own, and next to the digital model; and report every
        site's signal to quantisation noise ratio, arrays and conversions.
    """

    chips: int | None = None
    ages: tuple[str, ...] = ()
    compensate: Literal["on", "off"] | None = None
    read_noise: float | None = None
    adc_bits: int | None = None
    lora_in: Literal["sram", "cells"] = "sram"
    calibration_rows: int = CALIBRATION_ROWS
    report: bool = False


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """A digital run (setup, options, trained parameters), and the chips to evaluate it on.

    `modules` are the numbers of the pool's modules on the chips, `restored` the corrections of each chip or empty, and
    `configs` the arrays by age.
    """

    setup: Setup
    fused: FuseOptions
    params: Params
    chips: Chips
    count: int
    modules: Int[Array, " P"] | None
    restored: list[Restored]
    configs: dict[str | None, CrossbarConfig]


def _load_request(options: EvaluateOnChipsOptions) -> EvaluationRequest:
    """Load the run and the chips that the options name.

    Raises:
      ValueError: chips with other weights, an age without a drift model, or a run without a LoRA for cells.
    """
    assert options.crossbar is not None
    at_least(1, chips=options.chips, calibration_rows=options.calibration_rows)
    chips = load_chips(
        options.crossbar, key=options.chip_key, digital=options.keep_digital
    )
    config = chips.config
    if options.read_noise is not None:
        noise = ReadNoise(options.read_noise) if options.read_noise else None
        device = dataclasses.replace(config.device, read_noise=noise)
        config = dataclasses.replace(config, device=device)
    if options.adc_bits is not None:
        if config.adc is None:
            raise ValueError(
                f"{options.crossbar} has no ADC to give {options.adc_bits} bits: leave out --adc-bits"
            )
        adc = dataclasses.replace(config.adc, bits=options.adc_bits)
        config = dataclasses.replace(config, adc=adc)
    compensate = _COMPENSATE[options.compensate]
    configs = {
        age: aged(config, age, compensate=compensate) for age in options.ages or (None,)
    }
    count = options.chips or chips.count or 1
    if count > 1 and not is_random(config) and not config.reads_at_random:
        raise ValueError(
            f"nothing in {options.crossbar} is random, so {count} chips are all alike: use 1"
        )
    chips.chip_key(count - 1)  # raises ValueError where the file has fewer
    setup, fused, params = load_to_evaluate(options)
    check(setup, fused)
    setup = chips.checked(setup, fused.control)
    numbers = module_numbers(setup, fused, chips)
    restored = []
    if options.restore is not None:
        base = digests(setup)["base"]
        restored = load_restored(
            options.restore,
            dataclasses.replace(chips, config=config),
            range(count),
            base,
        )
    if options.lora_in == "cells":
        setup, params = lora_in_cells(setup, params)
        numbers = None
    return EvaluationRequest(
        without_merged_pool(setup),
        fused,
        params,
        chips,
        count,
        numbers,
        restored,
        configs,
    )


def evaluate_on_chips(options: EvaluateOnChipsOptions) -> dict[str, Any]:
    """Return and write the scores of a run on every chip, at every age.

    Raises:
      ValueError: a run with examples in its prompts; and as `_load_request` does.
    """
    mesh = None if options.mesh is None else make_mesh(options.mesh)
    if mesh is not None:
        check_no_split(mesh.shape["model"])
    on = _load_request(options)
    check_writable(results_path(options))
    if on.fused.entry.answers == "examples":
        raise ValueError(
            f"{on.fused.method} has other examples in its prompts for every seed, but all chips of a program get the "
            "same prompts: give --report, which evaluates one chip after another"
        )
    params = on.params
    chips = on.chips
    count = on.count
    keys = jnp.stack([chips.chip_key(number) for number in range(count)])
    seeds = on.fused.seeds
    rows = []
    on_devices = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with on_devices, progress("chips", count * len(on.configs)) as bar:
        setup = on.setup.with_layers(unroll=False)
        setup = setup.with_problem(frozen=on_mesh(setup.problem.frozen, setup.config))
        for age, config in on.configs.items():
            on_all = on_every_chip(
                setup,
                params,
                chips.rules(config),
                keys,
                modules=on.modules,
                norm=options.norm,
                calibration_rows=options.calibration_rows,
                restored=on.restored,
            )
            everyone = for_every_chip(params, count)
            evaluation = evaluate(on_all, everyone, batch_size=options.eval_batch)
            computed = len(evaluation.correct)  # more on a mesh
            scores = seed_rows((seeds * computed)[:computed], evaluation)[
                : count * len(seeds)
            ]
            rows += [
                {
                    "age": age,
                    "compensate": _COMPENSATE[options.compensate],
                    "chip": number // len(seeds),
                }
                | {name: row[name] for name in ("seed", "exact_match", "loss")}
                for number, row in enumerate(scores)
            ]
            bar.update(count)
    labels = {"task": setup.task.name, "crossbar": options.crossbar, "chips": count}
    results = {**labels, **_settings(on.fused.method, options), "rows": rows}
    write_json(results_path(options), results)
    return results


def report_on_chips(options: EvaluateOnChipsOptions) -> dict[str, Any]:
    """Return and write the scores of a run digitally and on every chip, its arrays, and their errors by site.

    Raises:
      ValueError: more than one age, or a mesh; and as `_load_request` does.
    """
    if len(options.ages) > 1:
        raise ValueError("a report is of one age: give one of --ages")
    if options.mesh is not None:
        raise ValueError(
            "a report evaluates one chip after another: leave out --mesh, or --report"
        )
    on = _load_request(options)
    check_writable(path := results_path(options, "crossbar"))
    ((age, config),) = on.configs.items()
    params = on.params
    chips = on.chips
    digital = seed_rows(*evaluate_seeds(on.setup, on.fused, params))
    setup = on.setup.with_layers(unroll=False)
    problem = setup.problem
    run = logits_of(problem.graph, problem.method)
    batches = list(
        calibration_batches(
            setup, params, options.calibration_rows, batch_size=options.eval_batch
        )
    )
    chip_rows = []
    sites = []
    for chip in progress("chips", range(on.count)):
        started = time.perf_counter()
        frozen = program(
            problem.graph,
            problem.frozen,
            chips.rules(config),
            chips.chip_key(chip),
            modules=on.modules,
            norm=options.norm,
            restored=on.restored[chip] if on.restored else None,
        )
        frozen = calibrate_tree(run, frozen, batches)
        rows = site_errors(frozen, observe(run, frozen, batches))
        calibrated = time.perf_counter()
        evaluated = evaluate_seeds(setup.with_problem(frozen=frozen), on.fused, params)
        seconds = {
            "program": calibrated - started,
            "evaluate": time.perf_counter() - calibrated,
        }
        chip_rows.append(
            {
                "chip": chip,
                "seeds": seed_rows(*evaluated),
                "seconds": seconds,
                "matrices": rows,
            }
        )
        sites = [_site(leaf) for leaf in chips_in(frozen)]
    results = {
        "task": setup.task.name,
        "config": options.crossbar,
        "config_sha256": config_hash(config),
        "digital_weights": list(chips.digital),
        "age": age,
        "compensate": _COMPENSATE[options.compensate],
        **_settings(on.fused.method, options),
        "chip_key": options.chip_key if chips.file is None else chips.file["key"],
        "digital": digital,
        "chips": chip_rows,
        "sites": sites,
        "arrays": sum(site["arrays"] for site in sites),
    }
    write_json(path, results)
    return results


def _settings(method: str, options: EvaluateOnChipsOptions) -> dict[str, Any]:
    """Return the settings of an evaluation that results record."""
    return {
        "method": method,
        "options": _given(options),
        "read_noise": options.read_noise,
        "adc_bits": options.adc_bits,
        "norm": options.norm,
        "restore": options.restore,
        "lora_in": options.lora_in if method == "lora" else None,
    }


def results_path(
    options: EvaluateOnChipsOptions, kind: Literal["chips", "crossbar"] = "chips"
) -> Path:
    """Return the file of an evaluation, or of a report, `crossbar`: its digest is of the options that change it."""
    digest = hashlib.sha256(json.dumps(_given(options)).encode()).hexdigest()[:12]
    return (
        options.run
        / f"{kind}-{Path(options.crossbar or '').name[:_LONGEST_NAME]}-{digest}.json"
    )


def _given(options: EvaluateOnChipsOptions) -> dict[str, Any]:
    """Return the options of an evaluation that are not at their defaults, with absolute paths of files."""
    given = {}
    for name, value in vars(options).items():
        if name in ("run", "eval_batch", "report", "mesh"):
            continue
        if value == getattr(EvaluateOnChipsOptions, name):
            continue
        if name in ("crossbar", "task", "restore") and os.path.exists(value):
            value = str(Path(value).resolve())
        given[name] = list(value) if isinstance(value, tuple) else value
    return given


def lora_in_cells(setup: Setup, params: Params) -> tuple[Setup, Params]:
    """Return a trained LoRA as a pool with one module for each seed, so that it is programmed like modules."""
    problem = setup.problem
    method = setup.problem.method
    if not isinstance(method, LoRA) or method.dora:
        raise ValueError(
            "the run trained no LoRA to write into cells: leave out --lora-in cells"
        )
    seeds = len(problem.index)
    pool = as_pool(method, params, [f"seed {seed}" for seed in range(seeds)])
    terms = jax.jit(gram)(pool, kernels(nnx.merge(problem.graph, problem.frozen.base)))
    frozen = dataclasses.replace(problem.frozen, pool=pool, gram=terms)
    index = jnp.arange(seeds)[:, None]
    setup = setup.with_problem(frozen=frozen, method=PLAIN_SUM, index=index)
    return setup, {"coefficients": jnp.ones((seeds, 1))}


def _site(chip: Chip) -> dict[str, Any]:
    """Return the counts of a programmed weight, with each matrix in separate arrays."""
    matrices = math.prod(chip.shape[:-2])
    explanation = explain(chip)
    return {
        "site": chip.name,
        "matrices": matrices,
        "shape": list(chip.matrix_shape),
        "arrays": matrices * explanation.arrays,
        "utilisation": explanation.utilisation,
        "conversions": explanation.conversions,
        "path": explanation.path,
    }
