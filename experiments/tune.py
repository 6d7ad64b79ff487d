"""Tune the learning rates of every trained method on the two tuning tasks, each with the same number of trials.

    python experiments/tune.py
    python experiments/tune.py --methods LoRA DoRA
    python experiments/tune.py --shots 5            # five examples: every rate a third of those tried on 95

writes runs/tune/results.json and runs/tune/table.csv. What it found is in `lab/methods.py`.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import _script
from lab.common import ROOT, SMALL, fresh_folder, fuse_small, small_pool_in_basis, write_csv
from lab.methods import COEFFICIENTS, IN_BASIS

from lorafusion_jax.parts import markdown
from lorafusion_jax.report import write_text
from lorafusion_jax.trials import ARMS, TRAIN_ROWS, Shots

FOLDER = ROOT / "runs" / "tune"
TASKS = ("reverse_starcon", "rotr_next")
SEEDS = (101, 102)  # not those of the demo
_COEFFICIENTS, _MAGNITUDES = (0.03, 0.1, 0.3), (0.01, 0.03, 0.1)
_PAIRS = [{"lr_coefficients": c, "lr_magnitudes": m} for c in _COEFFICIENTS for m in _MAGNITUDES]
_DORA = [{"lr_lora": r, "lr_magnitudes": m} for r in (1e-3, 2e-3, 5e-3) for m in _MAGNITUDES]
_RATES = [{"lr_coefficients": r} for r in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)]
TRIALS: dict[str, list[dict[str, float]]] = {
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


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", choices=list(TRIALS), default=list(TRIALS), help="to tune; all by default"
    )
    parser.add_argument("--shots", choices=list(TRAIN_ROWS), default="95+5", help="rows to learn from")
    options = parser.parse_args(list(arguments))
    with fresh_folder(FOLDER):
        measured = []
        jobs = [(method, rates) for method in options.methods for rates in _trials(method, options.shots)]
        for number, (method, rates) in enumerate(jobs, start=1):
            measured.append(_trial(method, rates, options.shots))
            print(f"[{number}/{len(jobs)}] {', '.join(_line(measured[-1]))}", file=sys.stderr, flush=True)
        lines = table_of(measured)
        write_text(FOLDER / "results.json", json.dumps({"seeds": SEEDS, "trials": measured}, indent=1) + "\n")
        write_csv(FOLDER / "table.csv", lines)
    print(f"{markdown(lines, left=(0, 1))}\nwritten to {FOLDER}")


def table_of(measured: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a table of all trials, with an arrow at the best of each method (the first of equals)."""
    best: dict[str, dict[str, Any]] = {}
    for trial in measured:
        leader = best.setdefault(trial["method"], trial)
        best[trial["method"]] = max(leader, trial, key=lambda t: t["exact_match"])
    lines = [[*_line(trial), "←" if trial is best[trial["method"]] else ""] for trial in measured]
    return [["method", "rates", *TASKS, "mean", "best"], *lines]


def _trials(method: str, shots: Shots) -> list[dict[str, float]]:
    share = 1 if shots == "95+5" else 1 / 3
    return [{name: float(f"{share * rate:.2g}") for name, rate in rates.items()} for rates in TRIALS[method]]


def _trial(method: str, rates: dict[str, float], shots: Shots) -> dict[str, Any]:
    """Return exact match (percent, mean of the seeds) and loss by task, and the mean of both tasks."""
    entry = dataclasses.replace((ARMS | COEFFICIENTS | IN_BASIS)[method], rates=rates, few_rates=rates)
    pool = small_pool_in_basis() if "basis" in entry.recipe else SMALL / "adapters"
    with tempfile.TemporaryDirectory() as out:
        found = {
            task: fuse_small(task, entry, pool=pool, seeds=SEEDS, out=Path(out), name=task, shots=shots)
            for task in TASKS
        }
    return {
        "method": method,
        "rates": rates,
        "tasks": {
            task: {key: [seed[key] for seed in results["seeds"]] for key in ("exact_match", "loss")}
            for task, results in found.items()
        },
        "exact_match": fmean(results["exact_match"] for results in found.values()),
    }


def _line(trial: dict[str, Any]) -> list[str]:
    rates = ", ".join(f"{name} {rate:g}" for name, rate in trial["rates"].items())
    scores = [fmean(task["exact_match"]) for task in trial["tasks"].values()]
    return [trial["method"], rates, *(f"{score:.1f}" for score in (*scores, trial["exact_match"]))]


if __name__ == "__main__":
    _script.run(main)
