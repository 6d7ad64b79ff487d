"""A real language model, before and after a pool of 24 adapters is fused for a task that none saw: `make demo-llm`.

SmolLM2-135M-Instruct is read from its GGUF file. Its adapters were trained on relations of words, facts, letters and
lists; the new task is the -ing form of verbs. Written to runs/demo-llm: the pool, every run, results.jsonl, table.md
and a plot.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import _script
from lab.common import ROOT, convert, fresh_folder, slug
from lab.demo_report import markdown_table, plot_accuracy
from lab.language import MAIN, PROMPT, options_of
from lab.smollm2 import EXAMPLES, base

from lorafusion_jax import fuse
from lorafusion_jax.report import write_text
from lorafusion_jax.runs import RunFolder
from lorafusion_jax.trials import Job, read_rows, run_jobs

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
        where: Any = {
            "base": base(),
            "pool": FOLDER / "pool",
            "seeds": (1,),
            "out": FOLDER / "runs",
        }
        task = EXAMPLES / "tasks" / "ing"
        file = FOLDER / "results.jsonl"
        runs = {
            method: options_of(MAIN[method], task, name=slug(method), **where)
            for method in METHODS
        }
        run_jobs(
            [Job(TITLE, method, "95+5", run) for method, run in runs.items()],
            file,
            fuse,
        )
        rows = read_rows(file)
        plot_accuracy(
            rows,
            FOLDER / "accuracy.png",
            title="SmolLM2-135M: a task that no adapter was trained on",
        )
        table = markdown_table(rows)
        write_text(FOLDER / "table.md", table)
    minutes = (time.perf_counter() - began) / 60
    _show(
        *(
            RunFolder(FOLDER / "runs" / slug(method)).predictions()
            for method in ("zero-shot", "LoRAFusion")
        )
    )
    print(
        "", *(f"{method:17}{meaning}" for method, meaning in METHODS.items()), sep="\n"
    )
    print(f"\n{table}\n{minutes:.1f} minutes; written to {FOLDER}")


def _show(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> None:
    """Print a few answers of the base and of the fusion."""
    print(f"\n{PROMPT.format(input='...')}\n")
    print(f"{'':14}{'before':32}after")
    for base_row, fused_row in list(zip(before, after, strict=True))[:SHOWN]:
        word = base_row["input"].splitlines()[0].removeprefix("Q: ")
        print(
            f"{word:14}{_short(base_row['prediction']):32}{_short(fused_row['prediction'])}"
        )


def _short(text: str) -> str:
    """Return an answer on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 28 else line[:27] + "…"


if __name__ == "__main__":
    _script.run(main)
