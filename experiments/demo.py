"""The embedded pool, converted and fused for tasks that none of its adapters was trained on: `make demo`.

Everything goes through the commands that a user has. Written to runs/demo: the pool, every run, results.json,
table.md and plots.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import _script
from lab.common import ROOT, convert_small_pool, fresh_folder, options_of_small
from lab.demo_report import markdown_table, plot_accuracy, plot_learning_curves

from lorafusion_jax import PRESETS, fuse, load_pool, load_run
from lorafusion_jax.parts import RunFolder, column_names
from lorafusion_jax.report import plot_coefficients, write_text
from lorafusion_jax.trials import ARMS

FOLDER = ROOT / "runs" / "demo"
SEEDS = (1, 2, 3)
# The four of the six tasks for measurement that the base alone answers least.
TASKS = ("swapends_prev", "double_digit", "pairswap_numvow", "sort_next2")
OUT_OF_REACH = "reverse_mirror"  # no adapter has its op

SHOWN = ("zero-shot", "LoraHub", "coefficients only", "LoRAFusion", "random pool", "LoRA")


def main(arguments: Sequence[str] = ()) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    began = time.perf_counter()
    with fresh_folder(FOLDER):
        convert_small_pool(FOLDER / "pool")
        jobs = [(task, method) for task in (*TASKS, OUT_OF_REACH) for method in SHOWN]
        rows, environment = [], {}
        for number, (task, method) in enumerate(jobs, start=1):
            results = _run(task, method)
            rows += _rows(task, method, results)
            environment = results["environment"]
            score = f"{results['exact_match']:.1f} % in {sum(results['seconds'].values()):.1f} s"
            print(f"[{number:2}/{len(jobs)}] {task}, {method}: {score}", file=sys.stderr, flush=True)
        table = markdown_table(rows, apart=(OUT_OF_REACH,))
        write_text(FOLDER / "table.md", table)
        _plot(rows)
        minutes = (time.perf_counter() - began) / 60
        summary = {
            "rates": {method: ARMS[method].rates for method in SHOWN},
            "minutes": minutes,
            "environment": environment,
            "rows": rows,
        }
        write_text(FOLDER / "results.json", json.dumps(summary, indent=1) + "\n")
    print(f"\n{table}\n{minutes:.1f} minutes; written to {FOLDER}")


def _run(task: str, method: str) -> dict[str, Any]:
    name = _name(task, method)
    where: Any = {"pool": FOLDER / "pool", "seeds": SEEDS, "out": FOLDER / "runs", "name": name}
    return fuse(options_of_small(task, ARMS[method], **where))


def _rows(task: str, method: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each seed; of the seconds, which all seeds took together, its share."""
    seconds = results["seconds"]["train"] / len(results["seeds"])
    shared = {"task": task, "method": method, "trainable": results["trainable"], "seconds": seconds}
    return [shared | {key: seed[key] for key in ("seed", "exact_match", "loss")} for seed in results["seeds"]]


def _plot(rows: list[dict[str, Any]]) -> None:
    title = f"Tasks that no adapter was trained on: mean of {len(SEEDS)} seeds, their spread, and each one as a dot"
    plot_accuracy(rows, FOLDER / "accuracy.png", apart=(OUT_OF_REACH,), title=title)
    metrics = {
        task: {method: RunFolder(FOLDER / "runs" / _name(task, method)).metrics() for method in SHOWN}
        for task in (*TASKS, OUT_OF_REACH)
    }
    plot_learning_curves(metrics, FOLDER / "learning_curves.png", title="Loss of the training batches")
    columns = column_names(load_pool(FOLDER / "pool"), PRESETS["default"].granularity)
    for task in TASKS:
        _, params, config = load_run(FOLDER / "runs" / _name(task, "LoRAFusion"))
        plot_coefficients(
            params["coefficients"][0],
            config["modules"][0],
            columns,
            FOLDER / f"coefficients_{task}.png",
            title=f"{task}, seed {SEEDS[0]}",
        )


def _name(task: str, method: str) -> str:
    return f"{task}-{method}".replace(" ", "-").lower()


if __name__ == "__main__":
    _script.run(main)
