"""`lorafusion evaluate`: evaluate fused runs or mixtures on a task, digitally or on simulated chips."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..hardware.evaluate import (
    EvaluateOnChipsOptions,
    evaluate_on_chips,
    report_on_chips,
    results_path,
)
from ..runs.folder import load_run
from ..runs.options import check_digital
from ..runs.predict import (
    EvaluateOptions,
    evaluate_mixture,
    evaluate_run,
)
from ..support.reading import show
from ..support.text_tables import plain
from ..tasks import task_name
from .parsing import parse, part_of
from .scores import loss, score_lines, score_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand(EvaluateOnChipsOptions):
    """Evaluate fused runs, each on its own task or all on another one, digitally or one of them on simulated chips.

    With --base and --pool, evaluate a weighted sum of modules on a task.

    Examples:
      lorafusion evaluate --run runs/snarks-fusion --task bbh/ruin_names.json
      lorafusion evaluate --runs runs/snarks-fusion runs/hyperbaton-fusion
      lorafusion evaluate --run runs/snarks-fusion --crossbar noisy_chips.json --ages 1s 1h 1day 1month 1year
      lorafusion evaluate --run runs/snarks-fusion --crossbar noisy.yaml --chips 8 --adc-bits 6 --read-noise 0.01
      lorafusion evaluate --run runs/snarks-fusion --crossbar isaac --report
      lorafusion evaluate --base base --pool pool --weights sort_dash=0.7 --task tasks/sort_next2

    Attributes:
      run: folder of the run.
      runs: folders of several runs, instead of --run, which are evaluated digitally, one after the other.
      base: base model of a mixture, instead of --run.
      pool: pool of the mixture.
      weights: weights of the mixture's modules, as name=number.
      weights_file: JSON file of the weights, as in `lorafusion merge`.
      prompt: template of the mixture's input, with {input} or other columns of the task's rows.
      chat: put the mixture's input into the base model's own chat template.
    """

    run: Path | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    runs: tuple[Path, ...] = ()
    base: str | None = None
    pool: str | None = None
    weights: tuple[str, ...] = ()
    weights_file: Path | None = None
    prompt: str | None = None
    chat: bool = False


def evaluate_command(arguments: Sequence[str]) -> None:
    """Evaluate the runs, and print a line for each seed, for each age of the chips, or for each chip."""
    command = parse(EvaluateCommand, arguments, "evaluate")
    if command.runs:
        rows = _evaluate_runs(command)
        show(plain(score_lines(rows, "run", "task", "seed"), left=(0, 1, 2, 4)))
        return
    if command.base is not None and command.run is None:
        if command.pool is None or command.task is None:
            raise ValueError(
                "a mixture needs a pool and a task: give both, --pool and --task"
            )
        show(
            score_table(
                evaluate_mixture(**part_of(command, evaluate_mixture, "--base"))
            )
        )
        return
    if command.run is None:
        raise ValueError(
            "nothing to evaluate: give a run with --run, several with --runs, or --base and --pool"
        )
    options = EvaluateOnChipsOptions(
        **part_of(command, EvaluateOnChipsOptions, "--run")
    )
    if options.crossbar is None:
        every = EvaluateOnChipsOptions.__dataclass_fields__
        digital = EvaluateOptions.__dataclass_fields__
        check_digital(options, [name for name in every if name not in digital])
        show(score_table(evaluate_run(options)))
    elif options.report:
        results = report_on_chips(options)
        path = results_path(options, "crossbar")
        show(f"{site_table(results)}\n{chip_table(results)}\nwritten to {path}")
    else:
        show(
            f"{age_table(evaluate_on_chips(options))}\nwritten to {results_path(options)}"
        )


def _evaluate_runs(command: EvaluateCommand) -> list[dict[str, Any]]:
    """Return the scores of every seed of several runs, with the run's folder and the task's name."""
    if command.run is not None:
        raise ValueError("--run and --runs name runs: leave one of them out")
    tasks = {run: command.task or load_run(run)[0].task for run in command.runs}
    rows = []
    for run, task in tasks.items():
        one_run = dataclasses.replace(command, run=run, runs=())
        options = EvaluateOptions(**part_of(one_run, EvaluateOptions, "--runs"))
        labels = {"run": str(run), "task": task_name(task)}
        rows += [labels | row for row in evaluate_run(options)]
    return rows


def age_table(results: Mapping[str, Any]) -> str:
    """Return a table of the ages: mean over chips and seeds, and the spread of the chips' means."""
    lines = [["age", "compensated", "exact match %", "between chips", "loss"]]
    for age, compensate in dict.fromkeys(
        (row["age"], row["compensate"]) for row in results["rows"]
    ):
        here = [
            row
            for row in results["rows"]
            if (row["age"], row["compensate"]) == (age, compensate)
        ]
        of_chips = [
            np.mean([row["exact_match"] for row in here if row["chip"] == n])
            for n in range(results["chips"])
        ]
        spread = f"± {np.std(of_chips, ddof=1):.1f}" if len(of_chips) > 1 else "-"
        kind = {None: "-", True: "yes", False: "no"}[compensate]
        losses = [row["loss"] for row in here]  # None is not finite
        mean_loss = None if None in losses else float(np.mean(losses))
        lines.append(
            [age or "-", kind, f"{np.mean(of_chips):.1f}", spread, loss(mean_loss)]
        )
    return plain(lines, left=(0, 1, 4))


def chip_table(results: Mapping[str, Any]) -> str:
    """Return a table of the seeds, digitally and on every chip."""
    chips = ({"chip": "digital", "seeds": results["digital"]}, *results["chips"])
    rows = [row | {"chip": chip["chip"]} for chip in chips for row in chip["seeds"]]
    return plain(score_lines(rows, "seed", "chip"), left=(0, 1, 3))


def site_table(results: Mapping[str, Any]) -> str:
    """Return a table of the sites: arrays, use of their cells, conversions, and errors over all chips."""
    head = [
        "site",
        "matrices",
        "arrays",
        "cells used",
        "conversions",
        "path",
        "SQNR dB",
        "worst",
        "clipped",
    ]
    lines = [head]
    for site in results["sites"]:
        rows = [
            row
            for chip in results["chips"]
            for row in chip["matrices"]
            if row["site"] == site["site"]
        ]
        errors = ["", "", ""]
        if rows:
            sqnr = [row["sqnr"] for row in rows]
            errors = [
                f"{statistics.fmean(sqnr):.1f}",
                f"{min(sqnr):.1f}",
                f"{max(row['clipped'] for row in rows):.2%}",
            ]
        counts = [
            f"{site['matrices']:,}",
            f"{site['arrays']:,}",
            f"{site['utilisation']:.1%}",
        ]
        lines.append(
            [site["site"], *counts, f"{site['conversions']:,}", site["path"], *errors]
        )
    lines.append(["all", "", f"{results['arrays']:,}", *[""] * 6])
    return plain(lines, left=(0, head.index("path")))
