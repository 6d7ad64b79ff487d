"""`lorafusion evaluate`: a fused run on a task, digitally or on simulated chips."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..columns import plain
from ..hardware.evaluate import EvaluateOnChipsOptions, evaluate_on_chips, results_path
from ..runs.apply import evaluate_run
from .parsing import parse
from .scores import cells


def main(arguments: Sequence[str]) -> None:
    """Evaluate, and print a line for each seed, or for each age of the chips."""
    options = parse(EvaluateOnChipsOptions, arguments, "evaluate")
    if options.crossbar is None:
        options.check_digital()
        print(plain(cells(evaluate_run(options)), left=(0, 2)))
        return
    print(age_table(evaluate_on_chips(options)))
    print(f"written to {results_path(options)}")


def age_table(results: Mapping[str, Any]) -> str:
    """Return a table of the ages: mean over chips and seeds, and the spread of the chips' means."""
    lines = [["age", "compensated", "exact match %", "between chips", "loss"]]
    for age, compensate in dict.fromkeys((row["age"], row["compensate"]) for row in results["rows"]):
        here = [row for row in results["rows"] if (row["age"], row["compensate"]) == (age, compensate)]
        of_chips = [
            np.mean([row["exact_match"] for row in here if row["chip"] == chip]) for chip in range(results["chips"])
        ]
        spread = f"± {np.std(of_chips, ddof=1):.1f}" if len(of_chips) > 1 else "-"
        said = {None: "-", True: "yes", False: "no"}[compensate]
        loss = np.mean([row["loss"] for row in here])
        lines.append([age or "-", said, f"{np.mean(of_chips):.1f}", spread, f"{loss:.4f}"])
    return plain(lines, left=(0, 1, 4))
