"""Tune the learning rates of every trained method, each with as many trials, on tasks for nothing else.

    python experiments/tune.py                                           # nine trials on the embedded pool
    python experiments/tune.py --methods LoRA DoRA
    python experiments/tune.py --shots 5 --out runs/tune_5               # five examples: a third of every rate
    python experiments/tune.py --tasks function_vectors/dataset_files    # on real language

A trial is a run. On real language it has two passes and is scored by its loss on 100 test rows; two rates have thirteen
trials, and bases and choices of modules the rates of LoRAFusion. Results are rows of OUT/tune.jsonl; interrupted, the
same command continues. OUT/table_tune.csv shows all trials; `lab/methods.py` and `lab/language.py` have the
best ones.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import _script
import numpy as np
import tyro
from lab.common import ROOT, options_of_small, slug, small_pool_in_basis, write_csv
from lab.language import MAIN, MORE, TUNING, find, options_of
from lab.matrix import Arm
from lab.methods import ARMS, COEFFICIENTS, IN_BASIS
from language import LanguageOptions, link_tasks, linked_base, make_pools, pool_of

from lorafusion_jax import FuseOptions, fuse
from lorafusion_jax.report import as_markdown as markdown
from lorafusion_jax.trials import Job, Shots, read_rows, run_jobs

TASKS = ("reverse_starcon", "rotr_next")
SEEDS = (101, 102)  # not those of any table; real language has the first
_COEFFICIENTS = (0.03, 0.1, 0.3)
_MAGNITUDES = (0.01, 0.03, 0.1)
_PAIRS = [
    {"lr_coefficients": c, "lr_magnitudes": m}
    for c in _COEFFICIENTS
    for m in _MAGNITUDES
]
_DORA = [
    {"lr_lora": r, "lr_magnitudes": m} for r in (1e-3, 2e-3, 5e-3) for m in _MAGNITUDES
]
_RATES = [
    {"lr_coefficients": r} for r in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
]
Trials = dict[str, list[dict[str, float]]]
TRIALS: Trials = {
    "LoRAFusion": _PAIRS,
    "LoRAFusion, mix": _PAIRS,
    "coefficients only": _RATES,
    "magnitudes only": [
        {"lr_magnitudes": r}
        for r in (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)
    ],
    "random pool": _PAIRS,
    "LoRA": [
        {"lr_lora": r} for r in (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2)
    ],
    "DoRA": _DORA,
    "VeRA": [
        {"lr_vera": r} for r in (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 0.1, 0.2, 0.3)
    ],
    "full fine-tuning": [
        {"lr_full": r} for r in (3e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3)
    ],
    **dict.fromkeys(COEFFICIENTS, _RATES),
    "basis": _PAIRS,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the script.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders, to tune on real language.
      methods: rows of the table to tune; all by default.
      shots: rows to learn from, on the embedded pool.
      adapters: folder of the pool's adapters, on real language.
      out: folder of tune.jsonl and the runs, by default runs/tune or runs/language; what is there already is not run
        again.
    """

    tasks: Path | None = None
    methods: tuple[str, ...] = ()
    shots: Shots = "95+5"
    adapters: Path = LanguageOptions.adapters
    out: Path | None = None


def main(arguments: Sequence[str] = ()) -> None:
    """Run the trials that are missing, and write the table of all."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    small = options.tasks is None
    everything, tasks, score = (
        (TRIALS, TASKS, "exact_match") if small else (LANGUAGE_TRIALS, TUNING, "loss")
    )
    if unknown := [method for method in options.methods if method not in everything]:
        raise ValueError(
            f"no trials of {', '.join(unknown)}: choose of {'; '.join(everything)}"
        )
    shots = options.shots if small else "95+5"
    share = 1 / 3 if shots == "5" else 1
    trials = {
        name: [
            {rate: float(f"{share * value:.2g}") for rate, value in trial.items()}
            for trial in of_method
        ]
        for name, of_method in everything.items()
    }
    out = options.out or ROOT / "runs" / ("tune" if small else "language")
    arms = ARMS | COEFFICIENTS | IN_BASIS if small else MAIN | MORE
    jobs = []
    for method, task in itertools.product(options.methods or trials, tasks):
        for rates in trials[method]:
            arm = dataclasses.replace(arms[method], rates=rates, few_rates={})
            name = label(method, rates)
            run = run_of(
                options,
                task,
                arm,
                out=out / "runs",
                name=slug(f"{task}-{shots}-{name}"),
            )
            jobs.append(Job(task, name, shots, run))
    run_jobs(jobs, out / "tune.jsonl", fuse, root=ROOT)
    lines = table_of(
        [row for row in read_rows(out / "tune.jsonl") if row["shots"] == shots],
        trials,
        tasks,
        score,
    )
    write_csv(out / "table_tune.csv", lines)
    print(f"{markdown(lines, left=(0, 1))}\nwritten to {out}")


def label(method: str, rates: Mapping[str, float]) -> str:
    """Return the name of a trial in its rows."""
    return f"{method}: {', '.join(f'{name} {rate:g}' for name, rate in rates.items())}"


def table_of(
    rows: Sequence[Any], trials: Trials, tasks: Sequence[str], score: str
) -> list[list[str]]:
    """Return a table of all trials, with an arrow at each method's best mean of the tasks (the first of equals)."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:  # a loss that was not finite is null
        found.setdefault((row["method"], row["task"]), []).append(
            np.inf if row[score] is None else row[score]
        )
    places, best, head = (
        (3, np.argmin, "mean loss") if score == "loss" else (1, np.argmax, "mean")
    )
    lines = [["method", "rates", *tasks, head, "best"]]
    for method, of_method in trials.items():
        keys = [[(label(method, rates), task) for task in tasks] for rates in of_method]
        if not all(key in found for of_trial in keys for key in of_trial):
            continue
        scores = [[fmean(found[key]) for key in of_trial] for of_trial in keys]
        means = [fmean(of_trial) for of_trial in scores]
        for i, rates in enumerate(of_method):
            numbers = [f"{value:.{places}f}" for value in (*scores[i], means[i])]
            shown = label(method, rates).removeprefix(f"{method}: ")
            lines.append(
                [method, shown, *numbers, "←" if i == int(best(means)) else ""]
            )
    return lines


def run_of(options: Options, task: str, arm: Arm, **where: Any) -> FuseOptions:
    """Return the run of an arm on a task."""
    if options.tasks is None:
        pool = small_pool_in_basis() if "basis" in arm.recipe else None
        return options_of_small(
            task, arm, pool=pool, seeds=SEEDS, shots=options.shots, resume=True, **where
        )
    make_pools(options.adapters)
    model: Any = {
        "base": linked_base(),
        "pool": pool_of(options.adapters),
        "seeds": SEEDS[:1],
    }
    run = options_of(arm, find(task, link_tasks(options.tasks)), **model, **where)
    return dataclasses.replace(
        run, recipe=dataclasses.replace(run.recipe, epochs=PASSES)
    )


if __name__ == "__main__":
    _script.run(main)
