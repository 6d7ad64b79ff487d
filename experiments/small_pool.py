"""The main table on the embedded small pool: every method, five seeds, six tasks that no adapter was trained on.

    python experiments/small_pool.py                    # runs what is missing, then writes the report
    python experiments/small_pool.py --plan             # what it needs
    python experiments/small_pool.py --shots 5        # five examples, as LoraHub
    python experiments/small_pool.py --methods LoRAFusion LoRA --seeds 1 2

Results are rows of OUT/results.jsonl; interrupted, the same command continues.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import _script
import tyro
from lab.common import ROOT, SMALL, TASKS
from lab.matrix import MatrixOptions
from lab.methods import ARMS
from results_page import run_and_report


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallPoolOptions(MatrixOptions):
    __doc__ = MatrixOptions.__doc__

    base: str = str(SMALL / "base")
    pool: str = str(SMALL / "adapters")
    tasks: tuple[str, ...] = tuple(str(SMALL / "tasks" / name) for name in TASKS)
    out: Path = ROOT / "runs" / "small_pool"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(SmallPoolOptions, args=list(arguments), description=__doc__)
    run_and_report(options, ARMS, "Small pool", "LoRAFusion")


if __name__ == "__main__":
    _script.run(main)
