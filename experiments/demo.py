"""The embedded pool, converted and fused for tasks that none of its adapters was trained on: `make demo`.

Written to runs/demo: the pool, every run, results.jsonl, table.md and a plot.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import _script
from lab.common import ROOT, convert_small_pool, fresh_folder, options_of_small, slug
from lab.demo_report import markdown_table, plot_accuracy
from lab.methods import ARMS

from lorafusion_jax import fuse
from lorafusion_jax.report import write_text
from lorafusion_jax.trials import Job, read_rows, run_jobs

FOLDER = ROOT / "runs" / "demo"
SEEDS = (1, 2, 3)
# The four of the six tasks for measurement that the base alone answers least.
TASKS = ("swapends_prev", "double_digit", "pairswap_numvow", "sort_next2")
OUT_OF_REACH = "reverse_mirror"  # no adapter has its op
EXPLANATION = """Tasks that no adapter was trained on.
zero-shot: the base alone. random pool: random adapters of the same size."""

SHOWN = (
    "zero-shot",
    "LoraHub",
    "coefficients only",
    "LoRAFusion",
    "random pool",
    "LoRA",
)


def main(arguments: Sequence[str] = ()) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    began = time.perf_counter()
    with fresh_folder(FOLDER):
        convert_small_pool(FOLDER / "pool")
        where: Any = {"pool": FOLDER / "pool", "seeds": SEEDS, "out": FOLDER / "runs"}
        jobs = [
            Job(
                task,
                method,
                "95+5",
                options_of_small(
                    task, ARMS[method], name=slug(f"{task}-{method}"), **where
                ),
            )
            for task in (*TASKS, OUT_OF_REACH)
            for method in SHOWN
        ]
        file = FOLDER / "results.jsonl"
        run_jobs(jobs, file, fuse)
        rows = read_rows(file)
        title = f"Tasks that no adapter was trained on: mean of {len(SEEDS)} seeds, their spread, and each one as a dot"
        plot_accuracy(rows, FOLDER / "accuracy.png", apart=(OUT_OF_REACH,), title=title)
        table = markdown_table(rows, apart=(OUT_OF_REACH,))
        write_text(FOLDER / "table.md", table)
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{EXPLANATION}\n\n{table}\n{minutes:.1f} minutes; written to {FOLDER}")


if __name__ == "__main__":
    _script.run(main)
