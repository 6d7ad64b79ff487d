"""The report of a run on chips: accuracy of each chip, errors by site, arrays and conversions."""

import math
import time
from typing import Any

from ..crossbar import (
    calibrate_tree,
    chips_in,
    config_hash,
    explain,
    observe,
    site_errors,
)
from ..runs.evaluate import evaluate_seeds, seed_rows
from ..support.progress import progress
from ..support.writing import check_writable, write_json
from ..training.method import Frozen
from .chips import calibration_batches, logits_of
from .evaluate import (
    EvaluateOnChipsOptions,
    asked,
    compensation,
    results_path,
    settings,
)
from .program import program


def report_on_chips(options: EvaluateOnChipsOptions) -> dict[str, Any]:
    """Return and write the scores of a run digitally and on every chip, its arrays, and their errors by site.

    Raises:
      ValueError: more than one age, or a mesh; and as `asked` does.
    """
    if len(options.ages) > 1:
        raise ValueError("a report is of one age: give one of --ages")
    if options.mesh is not None:
        raise ValueError(
            "a report evaluates one chip after another: leave out --mesh, or --report"
        )
    on = asked(options)
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
    with progress("chips", on.count) as bar:
        for chip in range(on.count):
            started = time.perf_counter()
            restored = on.restored[chip] if on.restored else None
            frozen = program(
                problem.graph,
                problem.frozen,
                chips.rules(config),
                chips.chip_key(chip),
                modules=on.modules,
                norm=options.norm,
                restored=restored,
            )
            frozen = calibrate_tree(run, frozen, batches)
            rows = site_errors(frozen, observe(run, frozen, batches))
            calibrated = time.perf_counter()
            seeds, scores = evaluate_seeds(
                setup.with_problem(frozen=frozen), on.fused, params
            )
            seconds = {
                "program": calibrated - started,
                "evaluate": time.perf_counter() - calibrated,
            }
            chip_rows.append(
                {
                    "chip": chip,
                    "seeds": seed_rows(seeds, scores),
                    "seconds": seconds,
                    "matrices": rows,
                }
            )
            sites = _sites(frozen)
            bar.update()
    results = {
        "task": setup.task.name,
        "config": options.crossbar,
        "config_sha256": config_hash(config),
        "digital_weights": list(chips.digital),
        "age": age,
        "compensate": compensation(options),
        **settings(on.fused.method, options),
        "chip_key": options.chip_key if chips.file is None else chips.file["key"],
        "digital": digital,
        "chips": chip_rows,
        "sites": sites,
        "arrays": sum(site["arrays"] for site in sites),
    }
    write_json(path, results)
    return results


def _sites(frozen: Frozen) -> list[dict[str, Any]]:
    """Return the counts of every programmed weight, with each matrix in separate arrays."""
    sites = []
    for leaf in chips_in(frozen):
        matrices = math.prod(leaf.shape[:-2])
        explanation = explain(leaf)
        sites.append(
            {
                "site": leaf.name,
                "matrices": matrices,
                "shape": list(leaf.matrix_shape),
                "arrays": matrices * explanation.arrays,
                "utilisation": explanation.utilisation,
                "conversions": explanation.conversions,
                "path": explanation.path,
            }
        )
    return sites
