"""Digital fusions of the small T5 on restored chips, next to chips that nothing corrects and to training on them.

    python experiments/restore_small.py                          # 3 tasks x 3 seeds x 4 chips
    python experiments/restore_small.py --tasks sort_next2 --chips 2 --out runs/restore-quick

The chips, tasks and fusions are those of experiments/hardware.py, whose rows are the control that is trained on each
chip with labels. Corrections come from prompts of the tasks that the pool was trained on, without answers. Written to
OUT: restored.csv, and the corrections of each chip; interrupted, the same command continues.
"""

import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _script
import numpy as np
import tyro
from lab.common import ROOT, SMALL, write_csv
from lab.hardware import ChipsOptions, subject
from lab.string_pools import draw, split

from lorafusion_jax.parts import (
    EvaluateOnChipsOptions,
    RestoreMethod,
    RestoreOptions,
    evaluate_on_chips,
    markdown,
    restore_chips,
)
from lorafusion_jax.report import over_tasks, write_text
from lorafusion_jax.trials import ARMS

METHODS: tuple[RestoreMethod, ...] = ("scales", "low-rank")
PROMPTS = 10  # without answers, of each of the pool's tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChipsOptions):
    __doc__ = ChipsOptions.__doc__

    chips: int = 4
    out: Path = ROOT / "runs" / "restore-small"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    options.check()
    store = options.store()
    text = options.out / "prompts.txt"
    prompts = [row["context"] for task in split().pool for row in draw(task, PROMPTS, (0,))]
    write_text(text, "\n".join(prompts) + "\n")
    common: dict[str, Any] = {"crossbar": options.crossbar, "chip_key": options.chip_key}
    shares = {"none": 0.0}
    for method in METHODS:
        print(f"corrections: {method}", file=sys.stderr, flush=True)
        made = restore_chips(
            RestoreOptions(
                base=str(SMALL / "base"),
                text=(text,),
                chip=tuple(range(options.chips)),
                method=method,
                out=options.out / method,
                **common,
            )
        )
        shares[method] = made[0]["share"]
    matches: dict[str, dict[str, np.ndarray]] = {name: {} for name in ("digital", *shares)}
    for task in options.tasks:
        on = subject(store, task, "LoRAFusion", ARMS["LoRAFusion"], options)
        digital = store.rows(f"{task}-digital", lambda on=on: on.score_digitally(on.params))
        matches["digital"][task] = np.array([row["exact_match"] for row in digital])
        folder = on.options.out / str(on.options.name)
        of_run = {"chips": options.chips, "test_rows": options.test_rows, "norm": "ideal"}
        run = EvaluateOnChipsOptions(run=folder, **of_run, **common)
        for name in shares:
            corrected = run if name == "none" else dataclasses.replace(run, restore=str(options.out / name))
            rows = store.rows(f"{task}-{name}", lambda of=corrected: evaluate_on_chips(of)["rows"])
            of_chips = [[row["exact_match"] for row in rows if row["chip"] == chip] for chip in range(options.chips)]
            matches[name][task] = np.mean(of_chips, axis=1)
    if (options.crossbar, options.chip_key, options.seeds) == (Options.crossbar, Options.chip_key, Options.seeds):
        matches["trained there with labels"] = trained_there(options)
    lines = table(matches, shares)
    write_csv(options.out / "restored.csv", lines)
    print(f"{markdown(lines)}\nwritten to {options.out}")


def trained_there(options: Options) -> dict[str, np.ndarray]:
    """Return exact match of fusions that experiments/hardware.py trained on each chip [C], by task."""
    with (ROOT / "results" / "hardware" / "rows.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["case"] == "its chip" and not row["age"]]

    def of_chip(task: str, chip: int) -> float:
        here = [row for row in rows if row["task"] == task and row["chip"] == str(chip)]
        return float(np.mean([float(row["exact_match"]) for row in here]))

    return {task: np.array([of_chip(task, chip) for chip in range(options.chips)]) for task in options.tasks}


def table(matches: dict[str, dict[str, np.ndarray]], shares: dict[str, float]) -> list[list[str]]:
    """Return exact match in percent of each task and their mean, with its interval over chips.

    Args:
      matches: by corrections and task, of each chip [C]; of `digital`, of each seed.
      shares: digital parameters of the corrections as a share of the weights in arrays.
    """
    tasks = list(matches["digital"])
    lines = [["corrections", "% of the weights", *tasks, "mean", "95 % interval"]]
    for name, of_tasks in matches.items():
        mean = np.mean([of_task.mean() for of_task in of_tasks.values()])
        ends = None if name == "digital" else over_tasks(np.mean([*of_tasks.values()], axis=0).tolist())
        between = "-" if ends is None else f"{ends.low:.1f} to {ends.high:.1f}"
        share = f"{100 * shares[name]:.2f}" if name in shares else "-"
        lines.append([name, share, *(f"{of_task.mean():.1f}" for of_task in of_tasks.values()), f"{mean:.1f}", between])
    return lines


if __name__ == "__main__":
    _script.run(main)
