"""`lorafusion crossbar`: a fused run with its base model and its pool in simulated ReRAM arrays."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax

from ..checks import at_least
from ..crossbar import calibrate_tree, config_hash, explain, load_config, observe, site_errors
from ..crossbar.calibration.whole_model import programmed_leaves
from ..crossbar.chip.program import is_random
from ..crossbar.chip.tree import Rules
from ..io.checkpoint import write_json
from ..methods.method import Frozen
from ..runs.apply import EvaluateOptions, load_to_evaluate
from ..runs.evaluate import seed_rows
from ..runs.scoring import evaluate_seeds
from ..training.progress import progress
from .calibration import calibration_batches, logits_of, looped
from .program import program
from .setup import check, without_merged_pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossbarOptions(EvaluateOptions):
    """Evaluate a fused run with every matrix product on ReRAM arrays, beside the digital model.

    Base kernels, head and every module of the pool are programmed, their ADCs calibrated on the task's training
    rows. Prints each site's signal to quantisation noise ratio, arrays, and conversions; writes them to the run.

    Examples:
      lorafusion crossbar --run runs/snarks-fusion --config isaac
      lorafusion crossbar --run runs/snarks-fusion --config noisy.yaml --chips 4 --digital head "encoder.*[:1]"

    Attributes:
      config: a preset (ideal, isaac, puma, raella, neurram) or a .yaml or .json file.
      digital: patterns of weights that stay digital: `head`, `pool.*`, `*.ff.*`, `encoder.*[1:-1]` for inner layers.
      chips: how many chips to program, each with random errors of its own.
      chip_key: from which the chips' errors are drawn.
      calibration_rows: training rows that the ADCs are calibrated on.
    """

    config: str = "isaac"
    digital: tuple[str, ...] = ()
    chips: int = 1
    chip_key: int = 0
    calibration_rows: int = 64


def results_path(options: CrossbarOptions) -> Path:
    """Return the file that an evaluation on arrays writes."""
    return options.run / f"crossbar-{Path(options.config).stem}.json"


def evaluate_on_arrays(options: CrossbarOptions) -> dict[str, Any]:
    """Return and write what a run says digitally and on every chip, and what its arrays are.

    Raises:
      ValueError: on a configuration, a pattern, or a run that cannot be used.
    """
    config = load_config(options.config)
    at_least(1, chips=options.chips, calibration_rows=options.calibration_rows)
    if options.chips > 1 and not is_random(config) and not config.reads_at_random:
        raise ValueError(
            f"nothing in {options.config} is random, so {options.chips} chips are all alike: one is enough"
        )
    setup, fused, params = load_to_evaluate(options)
    check(setup, fused)
    setup = without_merged_pool(setup)
    rules: Rules = dict.fromkeys(options.digital) | {"*": config}
    digital = seed_rows(*evaluate_seeds(setup, fused, params))
    setup = looped(setup)
    run = logits_of(setup.graph, setup.method)
    batches = list(calibration_batches(setup, params, options.calibration_rows, batch_size=options.eval_batch))
    chips, sites = [], []
    with progress("chips", options.chips) as bar:
        for chip in range(options.chips):
            began = time.perf_counter()
            key = jax.random.fold_in(jax.random.key(options.chip_key), chip)
            frozen = program(setup.graph, setup.frozen, rules, key)
            frozen = calibrate_tree(run, frozen, batches)
            rows = site_errors(frozen, observe(run, frozen, batches))
            calibrated = time.perf_counter()
            on_chip = dataclasses.replace(setup, frozen=frozen)
            seeds, found = evaluate_seeds(on_chip, fused, params)
            seconds = {"program": calibrated - began, "evaluate": time.perf_counter() - calibrated}
            chips.append({"chip": chip, "seeds": seed_rows(seeds, found), "seconds": seconds, "matrices": rows})
            sites = _sites(frozen)
            bar.update()
    results = {
        "task": setup.task.name,
        "config": options.config,
        "config_sha256": config_hash(config),
        "digital_weights": list(options.digital),
        "chip_key": options.chip_key,
        "digital": digital,
        "chips": chips,
        "sites": sites,
        "arrays": sum(site["arrays"] for site in sites),
    }
    write_json(results_path(options), results)
    return results


def _sites(frozen: Frozen) -> list[dict[str, Any]]:
    """Return what every programmed weight takes: its matrices each on arrays of their own."""
    found = []
    for leaf in programmed_leaves(frozen):
        matrices = math.prod(leaf.shape[:-2])
        of_one = explain(leaf.config, leaf.state.shape, state=leaf.state)
        found.append(
            {
                "site": leaf.name,
                "layers": [leaf.first, leaf.first + leaf.shape[0]] if leaf.shape[:-2] else None,
                "matrices": matrices,
                "shape": list(leaf.state.shape),
                "arrays": matrices * of_one.arrays,
                "utilisation": of_one.utilisation,
                "conversions": of_one.conversions,
                "path": of_one.path,
            }
        )
    return found
