"""Tune learning rates on real language: nine trials for a single rate and thirteen for two, on the two tuning tasks.

    python experiments/language_tune.py --tasks function_vectors/dataset_files
    python experiments/language_tune.py --tasks function_vectors/dataset_files --methods LoRAFusion LoRA

A trial trains as a row of the table does, but for two passes, and is scored by its loss on 100 test rows of the tuning
tasks. Bases and choices of modules have the rates of LoRAFusion. Results are rows of OUT/tune.jsonl; interrupted, the
same command continues. OUT/table_tune.csv shows all trials; `lab/language.py` has the best of the first nine.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import _script
import jax.numpy as jnp
import numpy as np
import tyro
from lab.common import ROOT, write_csv
from lab.language import MAIN, MORE, TUNING, find, options_of, test_losses
from language import LanguageOptions, link_tasks, linked_base, make_pools, pool_of
from tune import TRIALS as SMALL_TRIALS

from lorafusion_jax.parts import fit, make_room, prepare, recipe_rates, start, with_targets
from lorafusion_jax.tasks import Split
from lorafusion_jax.trials import Cells

# On the embedded pool coefficients are tuned at 0.3 instead of 0.01.
_PAIRS = [{"lr_coefficients": c, "lr_magnitudes": m} for c in (0.01, 0.03, 0.1) for m in (0.01, 0.03, 0.1)]
# The best of those nine was at their edge, (0.01, 0.1); no single rate's was.
_PAIRS += [
    {"lr_coefficients": c, "lr_magnitudes": m} for c, m in ((0.003, 0.1), (0.003, 0.2), (0.01, 0.2), (0.03, 0.2))
]
TRIALS = {
    name: _PAIRS if trials[0].keys() == _PAIRS[0].keys() else trials
    for name, trials in SMALL_TRIALS.items()
    if name in MAIN | MORE
}
TRIALS["coefficients only, random pool"] = TRIALS["coefficients only"]
Key = tuple[str, str, str]  # method, task, rates as JSON
SEED, PASSES = 101, 2  # the seed is not one of the table's


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Options of the script.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders.
      methods: rows of the table to tune; by default all that are trained, other than bases and choices of modules.
      adapters: folder of the pool's adapters.
      out: folder of tune.jsonl; what is there already is not run again.
    """

    tasks: Path
    methods: tuple[str, ...] = tuple(TRIALS)
    adapters: Path = LanguageOptions.adapters
    out: Path = ROOT / "runs" / "language"


def main(arguments: Sequence[str] = ()) -> None:
    """Run the trials that are missing, and write the table of all."""
    options = tyro.cli(TuneOptions, args=list(arguments), description=__doc__)
    if unknown := [method for method in options.methods if method not in TRIALS]:
        raise ValueError(f"no trials of {', '.join(unknown)}: choose of {'; '.join(TRIALS)}")
    tasks = link_tasks(options.tasks)
    make_pools(options.adapters)
    cells = Cells(options.out / "tune.jsonl", key_of)

    def measure(missing: Sequence[Key]) -> Iterator[dict[str, Any]]:
        for (method, task), of_task in itertools.groupby(missing, key=lambda key: key[:2]):
            make_room()
            trials = [json.loads(rates) for *_, rates in of_task]
            losses = _losses(method, find(task, tasks), options.adapters, trials)
            for rates, loss in zip(trials, losses, strict=True):
                yield {"method": method, "task": task, "rates": rates, "loss": loss}

    keys = [(m, t, json.dumps(rates)) for m in options.methods for t in TUNING for rates in TRIALS[m]]
    cells.fill(
        keys,
        measure,
        lambda row: f"{row['method']}, {row['task']}, {row['rates']}: loss {row['loss']:.3f}",
        lambda: write_csv(options.out / "table_tune.csv", table_of(cells.rows())),
    )


def key_of(row: dict[str, Any]) -> Key:
    return row["method"], row["task"], json.dumps(row["rates"])


def table_of(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a table of all trials, with an arrow at each method's lowest mean loss of both tasks."""
    lines = [["method", "rates", *TUNING, "mean loss", "best"]]
    loss = {key_of(row): row["loss"] for row in rows}
    for method, trials in TRIALS.items():
        keys = [[(method, task, json.dumps(rates)) for task in TUNING] for rates in trials]
        if not all(key in loss for of_trial in keys for key in of_trial):
            continue
        losses = [[loss[key] for key in of_trial] for of_trial in keys]
        means = [fmean(of_trial) for of_trial in losses]
        for i, rates in enumerate(trials):
            said = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
            numbers = [f"{found:.3f}" for found in (*losses[i], means[i])]
            lines.append([method, said, *numbers, "←" if i == int(np.nanargmin(means)) else ""])
    return lines


def _losses(method: str, path: Path, adapters: Path, trials: Sequence[dict[str, float]]) -> list[float]:
    """Return the loss of each trial on the test rows, in nats per token."""
    entry, count = (MAIN | MORE)[method], len(trials)
    options = with_targets(options_of(entry, path, base=linked_base(), pool=pool_of(adapters), seeds=(SEED,)))
    options = dataclasses.replace(options, recipe=dataclasses.replace(options.recipe, epochs=PASSES))
    setup = prepare(options)
    assert setup.split is not None
    # Every trial is a seed of the program, all with the same draws.
    problem = setup.problem.replace(index=jnp.repeat(setup.problem.index, count, axis=0))
    rows = setup.rows._replace(split=Split(*(np.repeat(part, count, axis=0) for part in setup.split)))
    seeds = (SEED,) * count
    rates = recipe_rates(problem.method, options.recipe, count)
    chosen = rates.learning_rate | {
        name.removeprefix("lr_"): jnp.array([trial[name] for trial in trials], jnp.float32) for name in trials[0]
    }
    state = fit(problem, rows, start(problem, seeds), options.recipe, seeds, rates=rates._replace(learning_rate=chosen))
    return test_losses(setup.with_problem(index=problem.index), state.params)


if __name__ == "__main__":
    _script.run(main)
