"""A real language model, before and after a pool of 24 adapters is fused for a task that none saw: `make demo-llm`.

SmolLM2-135M-Instruct is read from its GGUF file. Its adapters were trained on relations of words, facts, letters and
lists; the new task is the -ing form of verbs. Written to runs/demo-llm: the pool, every run, results.json, table.md and
a plot.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import _script
from lab.common import ROOT, convert, fresh_folder
from lab.demo_report import markdown_table, plot_accuracy
from lab.language import MAIN, PROMPT, options_of
from lab.smollm2 import EXAMPLES, base

from lorafusion_jax import fuse
from lorafusion_jax.parts import RunFolder
from lorafusion_jax.report import write_text

FOLDER = ROOT / "runs" / "demo-llm"
TITLE = "the -ing form of verbs"
# Rows of `lab.language.MAIN`, with descriptions.
METHODS = {
    "zero-shot": "the base as it is, without instructions",
    "few-shot prompt": "the base, with five examples in every prompt",
    "uniform mean": "all adapters at one 24th each, without training",
    "LoRAFusion": "trained coefficients of all adapters, and magnitudes; no matrix is changed",
}
SHOWN = 6  # words whose answers are printed


def main(arguments: Sequence[str] = ()) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    began = time.perf_counter()
    with fresh_folder(FOLDER):
        convert(base(), sorted((EXAMPLES / "adapters").iterdir()), FOLDER / "pool")
        rows, answers, environment = [], {}, {}
        for number, method in enumerate(METHODS, start=1):
            results = _run(method)
            seconds = sum(results["seconds"].values())
            seed = results["seeds"][0]
            rows.append(
                {"task": TITLE, "method": method, "trainable": results["trainable"], "seconds": seconds}
                | {key: seed[key] for key in ("seed", "exact_match", "loss")}
            )
            environment = results["environment"]
            answers[method] = RunFolder(FOLDER / "runs" / _name(method)).predictions()
            score = f"{results['exact_match']:.1f} % in {seconds:.1f} s"
            print(f"[{number}/{len(METHODS)}] {method}: {score}", file=sys.stderr, flush=True)
        table = markdown_table(rows)
        write_text(FOLDER / "table.md", table)
        plot_accuracy(rows, FOLDER / "accuracy.png", title="SmolLM2-135M: a task that no adapter was trained on")
        minutes = (time.perf_counter() - began) / 60
        summary = {"minutes": minutes, "environment": environment, "rows": rows}
        write_text(FOLDER / "results.json", json.dumps(summary, indent=1) + "\n")
    _show(answers["zero-shot"], answers["LoRAFusion"])
    print()
    for method, meaning in METHODS.items():
        print(f"{method:17}{meaning}")
    print(f"\n{table}\n{minutes:.1f} minutes; written to {FOLDER}")


def _run(method: str) -> dict[str, Any]:
    options = options_of(
        MAIN[method],
        EXAMPLES / "tasks" / "ing",
        base=base(),
        pool=FOLDER / "pool",
        seeds=(1,),
        out=FOLDER / "runs",
        name=_name(method),
    )
    return fuse(options)


def _show(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> None:
    """Print a few answers of the base and of the fusion."""
    print(f"\n{PROMPT.format(input='...')}\n")
    print(f"{'':14}{'before':32}after")
    for base_row, fused_row in list(zip(before, after, strict=True))[:SHOWN]:
        word = base_row["input"].splitlines()[0].removeprefix("Q: ")
        print(f"{word:14}{_short(base_row['prediction']):32}{_short(fused_row['prediction'])}")


def _short(text: str) -> str:
    """Return an answer on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 28 else line[:27] + "…"


def _name(method: str) -> str:
    return method.replace(" ", "-").lower()


if __name__ == "__main__":
    _script.run(main)
