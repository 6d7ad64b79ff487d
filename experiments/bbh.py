"""The main table on BIG-Bench Hard, on LoraHub's split of its 27 tasks.

    python experiments/bbh.py --base google/flan-t5-large --pool POOL --bbh BIG-Bench-Hard/bbh
    python experiments/bbh.py --base google/flan-t5-large --pool POOL --data data_bbh      # LoraHub's own folder
    python experiments/bbh.py --base flan-t5-large --data data_bbh --plan                  # what it needs

The benchmark's JSON files are split by an index of rows that comes with the package. data_bbh is the folder of
LoraHub's release 0.1 and holds the same rows (docs/guides/paper.md). Results are rows of OUT/results.jsonl;
interrupted, the same command continues.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import _script
import tyro
from lab.common import ROOT
from lab.matrix import MatrixOptions
from lab.methods import ARMS
from lab.tasks import lorahub_tasks, prompt_overlap
from results_page import run_and_report

from lorafusion_jax.tasks import BBH_DATA, LORAHUB_DATA, load_task, write_lorahub_split


@dataclasses.dataclass(frozen=True, kw_only=True)
class BBHOptions(MatrixOptions):
    """Options of the matrix.

    Attributes:
      bbh: folder of BIG-Bench Hard's JSON files, to be split as LoraHub did.
      data: folder of tasks that are split already, LoraHub's data_bbh, instead.
      tasks: names of tasks; all by default.
      methods: rows of the table; by default all but full fine-tuning, whose seeds are one program of ten times the
        memory of the others: run it alone, with one seed.
      out: folder of results.jsonl, the runs, and the split.
    """

    pool: str = "pool"
    bbh: Path | None = None
    data: Path | None = None
    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = tuple(
        name for name in ARMS if name != "full fine-tuning"
    )
    out: Path = ROOT / "runs" / "bbh"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(BBHOptions, args=list(arguments), description=__doc__)
    folders = _folders(options)
    for folder in folders:
        if overlap := prompt_overlap(load_task(folder)):
            rows = ", ".join(map(str, overlap))
            print(
                f"{folder.name}: prompts of the test set that are also among the training rows: {rows}"
            )
    matrix = dataclasses.replace(options, tasks=tuple(map(str, folders)))
    run_and_report(matrix, ARMS, "BIG-Bench Hard", "LoRAFusion")


def _folders(options: BBHOptions) -> list[Path]:
    if options.data is not None and options.bbh is None:
        there = lorahub_tasks(options.data)
        if unknown := set(options.tasks) - {path.name for path in there}:
            raise ValueError(f"{options.data} has no task {', '.join(sorted(unknown))}")
        return [
            path for path in there if not options.tasks or path.name in options.tasks
        ]
    if options.data is None and options.bbh is not None:
        return write_lorahub_split(
            options.bbh, options.out / "data_bbh", options.tasks or None
        )
    raise ValueError(
        f"no tasks: give --bbh with {BBH_DATA}, or --data with LoraHub's data_bbh ({LORAHUB_DATA}, unpacked)"
    )


if __name__ == "__main__":
    _script.run(main)
