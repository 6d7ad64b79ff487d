"""Tune the learning rates of every trained method, each with as many trials, on tasks for nothing else.

    python experiments/tune.py                                           # nine trials on the embedded pool
    python experiments/tune.py --methods LoRA DoRA
    python experiments/tune.py --shots 5 --out runs/tune_5               # five examples: a third of every rate
    python experiments/tune.py --tasks function_vectors/dataset_files    # on real language

On real language a trial is two passes and is scored by its loss on 100 test rows; two rates have thirteen trials, and
bases and choices of modules the rates of LoRAFusion. Results are rows of OUT/tune.jsonl; interrupted, the same command
continues. OUT/table_tune.csv shows all trials; `lorafusion_jax.trials.ARMS` and `lab/language.py` have the best ones.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import _script
import numpy as np
import tyro
from lab.common import ROOT, options_of_small, small_pool_in_basis, write_csv
from lab.language import MAIN, MORE, TUNING, find, options_of, test_losses
from lab.methods import COEFFICIENTS, IN_BASIS
from lab.tuning import train_trials
from language import LanguageOptions, link_tasks, linked_base, make_pools, pool_of

from lorafusion_jax import FuseOptions
from lorafusion_jax.parts import evaluate, make_room, markdown, prepare, with_targets
from lorafusion_jax.trials import ARMS, Cells, Shots

TASKS = ("reverse_starcon", "rotr_next")
SEEDS = (101, 102)  # not those of any table; real language has the first
_COEFFICIENTS, _MAGNITUDES = (0.03, 0.1, 0.3), (0.01, 0.03, 0.1)
_PAIRS = [{"lr_coefficients": c, "lr_magnitudes": m} for c in _COEFFICIENTS for m in _MAGNITUDES]
_DORA = [{"lr_lora": r, "lr_magnitudes": m} for r in (1e-3, 2e-3, 5e-3) for m in _MAGNITUDES]
_RATES = [{"lr_coefficients": r} for r in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)]
Trials = dict[str, list[dict[str, float]]]
TRIALS: Trials = {
    "LoRAFusion": _PAIRS,
    "LoRAFusion, mix": _PAIRS,
    "coefficients only": _RATES,
    "magnitudes only": [{"lr_magnitudes": r} for r in (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)],
    "random pool": _PAIRS,
    "LoRA": [{"lr_lora": r} for r in (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2)],
    "DoRA": _DORA,
    "VeRA": [{"lr_vera": r} for r in (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 0.1, 0.2, 0.3)],
    "full fine-tuning": [{"lr_full": r} for r in (3e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3)],
    **dict.fromkeys(COEFFICIENTS, _RATES),
    "basis": _PAIRS,
    "basis and core": [
        {"lr_coefficients": c, "lr_magnitudes": 0.01, "lr_core": r} for c in _COEFFICIENTS for r in (5e-4, 2e-3, 5e-3)
    ],
    "LoRA-XS": [{"lr_coefficients": 0.0, "lr_core": r} for r in (1e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2)],
    "mean module": _PAIRS,
}
# On real language coefficients are tuned at 0.01 instead of 0.3. The best of those nine was at their edge, (0.01, 0.1),
# so four more follow; no single rate's was.
_LANGUAGE_PAIRS = [
    {"lr_coefficients": c, "lr_magnitudes": m}
    for c, m in (
        *itertools.product((0.01, 0.03, 0.1), (0.01, 0.03, 0.1)),
        *((0.003, 0.1), (0.003, 0.2), (0.01, 0.2), (0.03, 0.2)),
    )
]
LANGUAGE_TRIALS: Trials = {
    name: _LANGUAGE_PAIRS if trials[0].keys() == _PAIRS[0].keys() else trials
    for name, trials in TRIALS.items()
    if name in MAIN | MORE
}
LANGUAGE_TRIALS["coefficients only, random pool"] = TRIALS["coefficients only"]
PASSES = 2  # over the training rows, on real language
Key = tuple[str, str, str]  # method, task, rates as JSON
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the script.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders, to tune on real language.
      methods: rows of the table to tune; all by default.
      shots: rows to learn from, on the embedded pool.
      adapters: folder of the pool's adapters, on real language.
      out: folder of tune.jsonl, by default runs/tune or runs/language; what is there already is not run again.
    """

    tasks: Path | None = None
    methods: tuple[str, ...] = ()
    shots: Shots = "95+5"
    adapters: Path = LanguageOptions.adapters
    out: Path | None = None


def main(arguments: Sequence[str] = ()) -> None:
    """Run the trials that are missing, and write the table of all."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    everything = TRIALS if options.tasks is None else LANGUAGE_TRIALS
    if unknown := [method for method in options.methods if method not in everything]:
        raise ValueError(f"no trials of {', '.join(unknown)}: choose of {'; '.join(everything)}")
    run, tasks, score = (
        (_small(options.shots), TASKS, "exact_match")
        if options.tasks is None
        else (_language(options.tasks, options.adapters), TUNING, "loss")
    )
    share = 1 / 3 if options.tasks is None and options.shots == "5" else 1
    trials = {
        name: [{rate: float(f"{share * value:.2g}") for rate, value in trial.items()} for trial in of_method]
        for name, of_method in everything.items()
    }
    out = options.out or ROOT / "runs" / ("tune" if options.tasks is None else "language")
    cells = Cells(out / "tune.jsonl", key_of, {"shots": options.shots} if options.tasks is None else {})

    def measure(missing: Sequence[Key]) -> Iterator[Row]:
        for (method, task), of_task in itertools.groupby(missing, key=lambda key: key[:2]):
            make_room()
            rates = [json.loads(key[-1]) for key in of_task]
            for trial, found in zip(rates, run(method, task, rates), strict=True):
                yield {"method": method, "task": task, "rates": trial, **found}

    cells.fill(
        [(m, t, json.dumps(rates)) for m in options.methods or trials for t in tasks for rates in trials[m]],
        measure,
        lambda row: f"{row['method']}, {row['task']}, {row['rates']}: {score} {row[score]:.3f}",
    )
    lines = table_of(cells.rows(), trials, tasks, score)
    write_csv(out / "table_tune.csv", lines)
    print(f"{markdown(lines, left=(0, 1))}\nwritten to {out}")


def key_of(row: Row) -> Key:
    return row["method"], row["task"], json.dumps(row["rates"])


def table_of(rows: Sequence[Row], trials: Trials, tasks: Sequence[str], score: str) -> list[list[str]]:
    """Return a table of all trials, with an arrow at each method's best mean of the tasks (the first of equals)."""
    found = {key_of(row): row[score] for row in rows}
    places, best, head = (3, np.nanargmin, "mean loss") if score == "loss" else (1, np.nanargmax, "mean")
    lines = [["method", "rates", *tasks, head, "best"]]
    for method, of_method in trials.items():
        keys = [[(method, task, json.dumps(rates)) for task in tasks] for rates in of_method]
        if not all(key in found for of_trial in keys for key in of_trial):
            continue
        scores = [[found[key] for key in of_trial] for of_trial in keys]
        means = [fmean(of_trial) for of_trial in scores]
        for i, rates in enumerate(of_method):
            said = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
            numbers = [f"{value:.{places}f}" for value in (*scores[i], means[i])]
            lines.append([method, said, *numbers, "←" if i == int(best(means)) else ""])
    return lines


Run = Callable[[str, str, Sequence[Mapping[str, float]]], list[Row]]  # of a method on a task


def _small(shots: Shots) -> Run:
    """Return a function that runs trials on an embedded task: exact match in percent and loss, means of the seeds."""

    def run(method: str, task: str, trials: Sequence[Mapping[str, float]]) -> list[Row]:
        arm = (ARMS | COEFFICIENTS | IN_BASIS)[method]
        pool = small_pool_in_basis() if "basis" in arm.recipe else None
        options = options_of_small(task, arm, pool=pool, seeds=SEEDS, shots=shots)
        found = evaluate(*train_trials(prepare(options), options, trials), batch_size=options.eval_batch)
        assert found.loss is not None
        parts = (np.reshape(values, (len(trials), len(SEEDS))).mean(1) for values in (found.exact_match, found.loss))
        return [{"exact_match": float(match), "loss": float(loss)} for match, loss in zip(*parts, strict=True)]

    return run


def _language(tasks: Path, adapters: Path) -> Run:
    """Return a function that runs trials on a task of real language: loss on the test rows, in nats per token."""
    folder = link_tasks(tasks)
    make_pools(adapters)

    def run(method: str, task: str, trials: Sequence[Mapping[str, float]]) -> list[Row]:
        where: Any = {"base": linked_base(), "pool": pool_of(adapters), "seeds": SEEDS[:1]}
        options: FuseOptions = with_targets(options_of((MAIN | MORE)[method], find(task, folder), **where))
        options = dataclasses.replace(options, recipe=dataclasses.replace(options.recipe, epochs=PASSES))
        setup, params = train_trials(prepare(options), options, trials)
        return [{"loss": loss} for loss in test_losses(setup, params)]

    return run


if __name__ == "__main__":
    _script.run(main)
