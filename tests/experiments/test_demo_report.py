"""The demos' report: means, the spread over seeds, and bars."""

import numpy as np
from lab.demo_report import markdown_table


def _row(task, method, seed, exact_match, trainable=1232, seconds=1.0):
    numbers = {"exact_match": exact_match, "trainable": trainable, "seconds": seconds}
    return {"task": task, "method": method, "seed": seed} | numbers


_ROWS = [
    _row("easy", "zero-shot", 1, 10.0, 0, 0.0),
    _row("hard", "zero-shot", 1, 2.0, 0, 0.0),
    _row("easy", "fusion", 1, 50.0, seconds=2.0),
    _row("easy", "fusion", 2, 60.0, seconds=4.0),
    *(_row("hard", "fusion", seed, match) for seed, match in ((1, 20.0), (2, 30.0))),
    *(_row("impossible", "fusion", seed, 0.0) for seed in (1, 2)),
]


def test_a_table_has_means_and_spreads_of_tasks_by_methods():
    lines = markdown_table(
        [*_ROWS, _row("easy", "LoRA", 1, 90.0, 900)], apart=("impossible",)
    ).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["exact match, %", "zero-shot", "fusion", "LoRA"]
    assert cells[2:] == [
        ["easy", "10.0", f"55.0 ± {np.std([50, 60], ddof=1):.1f}", "90.0"],
        ["hard", "2.0", f"25.0 ± {np.std([20, 30], ddof=1):.1f}", "–"],
        # The spread of the seeds' means, 35 and 45, not the mean of the spreads; LoRA lacks a task.
        ["**mean**", "6.0", f"40.0 ± {np.std([35, 45], ddof=1):.1f}", "–"],
        ["impossible", "–", "0.0 ± 0.0", "–"],
        ["trainable parameters", "0", "1,232", "900"],
        ["seconds of training", "0.0", "1.7", "1.0"],
    ]
    assert len({len(line) for line in lines}) == 1
    assert "| 900 to 1,232 |" in markdown_table(
        [*_ROWS, _row("hard", "fusion", 3, 1.0, 900)]
    )
