"""Is the sentence of `lorafusion trial` true? Trials on 20 and 40 rows, against rows that they never saw.

    python experiments/trial_truth.py --strings                             # six string tasks, half an hour
    python experiments/trial_truth.py --language --tasks FOLDER             # three language tasks, five hours
    python experiments/trial_truth.py --lora --tasks FOLDER                 # the tuned LoRA on twelve language tasks
    python experiments/trial_truth.py                                       # the table of the rows in OUT

FOLDER holds the function-vector data sets. The design is experiments/trial_truth.md. Written to OUT: truth.jsonl,
lora.jsonl, truth.csv. Interrupted, the same command continues.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _script
import numpy as np
import tyro
from lab.common import ROOT, SMALL, with_interval, write_csv
from lab.language import EVALUATED_ROWS, find, load
from lab.smollm2 import EXAMPLES, base
from pool_value_language import RESULTS, TUNING
from pool_value_language import draw as language_targets
from string_tasks import Task, draw

from lorafusion_jax import FuseOptions, LoRARecipe
from lorafusion_jax.tasks import load_task
from lorafusion_jax.trials import (
    Cells,
    Lanes,
    Training,
    TrialArm,
    TrialOptions,
    judge,
    read_lines,
    trial,
    tuned_rates,
)

STRINGS: dict[Task, tuple[str, ...]] = {
    Task("sort", "next"): (),
    Task("pairswap", "starcon"): (),
    Task("pairswap", "starvow"): ("starvow",),
    Task("pairswap", "next2"): ("next2",),
    Task("rotl", "starvow"): ("rotl", "starvow"),
    Task("swapends", "numvow"): ("swapends", "numvow"),
}
LANGUAGE = ("ing", "choose_middle_of_5", "word_length")
ROWS = (20, 40)
# rows that the truth is measured on
FURTHER_STRINGS = 200
FURTHER_LANGUAGE = 100
KEY = (20261130, 54)
POOL = "LoRAFusion"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      strings: measure the string tasks.
      language: measure the three language tasks.
      lora: measure the LoRA on the twelve language tasks.
      tasks: folder of the function-vector data sets.
      work: folder of the trials; what is there is not measured again.
      out: folder of results.
    """

    strings: bool = False
    language: bool = False
    lora: bool = False
    tasks: Path | None = None
    work: Path = ROOT / "runs" / "trial_truth"
    out: Path = ROOT / "results" / "trial"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    if (options.language or options.lora) and options.tasks is None:
        raise ValueError(
            "the language tasks are read from the function-vector data sets: give their folder by --tasks"
        )
    trials = {
        **(
            {task.name: string_trial(options.work, task) for task in STRINGS}
            if options.strings
            else {}
        ),
        **(
            {name: language_trial(options, name) for name in LANGUAGE}
            if options.language
            else {}
        ),
    }
    cells = Cells(options.out / "truth.jsonl", lambda row: (row["task"], row["rows"]))

    def measure(missing: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
        for name, rows in missing:
            yield {"task": name, "rows": rows} | compared(trials[name], rows)

    keys = [(name, rows) for rows in ROWS for name in trials]
    cells.fill(
        keys,
        measure,
        lambda row: f"{row['task']}, {row['rows']} rows: {row['sentence']}",
    )
    write_csv(options.out / "truth.csv", table(cells.rows()))
    of_lora = Cells(options.out / "lora.jsonl", lambda row: row["task"])
    if options.lora and options.tasks is not None:
        paths, _ = language_targets(options.tasks, options.work / "clean")
        of_lora.fill(
            [name for name in paths if name not in TUNING],
            lambda missing: (
                {"task": name} | lora(options, name, paths[name]) for name in missing
            ),
            lambda row: f"{row['task']}: {row['test_loss']:.3f}",
        )
    if rows := of_lora.rows():
        print(against_page(rows))


def string_trial(work: Path, task: Task) -> TrialOptions:
    """Return the trial of a string task, whose rows and pool are written if they are missing."""
    rows = draw(task, max(ROWS) + FURTHER_STRINGS, KEY)
    write_task(work / "tasks" / task.name, rows[: max(ROWS)], rows[max(ROWS) :])
    pool = work / "pools" / task.name
    pool.mkdir(parents=True, exist_ok=True)
    for adapter in (SMALL / "adapters").iterdir():
        link = pool / adapter.name
        if not {*adapter.name.split("_")} & {*STRINGS[task]} and not link.exists():
            link.symlink_to(adapter)
    return TrialOptions(
        base=str(SMALL / "base"),
        pool=str(pool),
        task=(str(work / "tasks" / task.name),),
    )


def language_trial(options: Options, name: str) -> TrialOptions:
    """Return the trial of a language task, whose rows are written if they are missing."""
    assert options.tasks is not None
    task = load(find(name, options.tasks))
    folder = options.work / "tasks" / name
    parts = (
        [{"input": row.input, "target": row.target} for row in part]
        for part in (task.train, task.test)
    )
    write_task(folder, *parts)
    return TrialOptions(
        base=str(base()), pool=str(EXAMPLES / "adapters"), task=(str(folder),)
    )


def write_task(folder: Path, train: Sequence[Any], test: Sequence[Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )


def compared(options: TrialOptions, rows: int) -> dict[str, Any]:
    """Return the verdict of a trial, and the true losses of its arms on further rows."""
    folder = Path(options.task[0])
    options = dataclasses.replace(
        options, train_rows=rows, out=folder.parents[1] / "trials" / str(rows)
    )
    began = time.process_time()
    ((one, outcomes),) = trial(options)
    said = judge(outcomes)
    seconds = time.process_time() - began
    further = load_task(folder).test[
        : FURTHER_LANGUAGE if folder.name in LANGUAGE else FURTHER_STRINGS
    ]
    lanes = Lanes(
        {name: run for name, (_, run) in one.arms.items()},
        (*one.rows, *further),
        options.seed,
    )
    train = tuple(range(rows))
    test = tuple(range(rows, rows + len(further)))
    losses: dict[str, Any] = {}
    for arm in outcomes.arms:
        of = outcomes.tuned[arm.name][:2] if arm.rates else ((), 1.0)
        trainings = [
            Training(
                arm.name, draw, *of, train if arm.learns else (), test, answers=False
            )
            for draw in arm.draws
        ]
        losses[arm.name] = np.mean(
            [scores.loss for scores in lanes.measure(trainings)], axis=0
        )
    of_pool = losses[next(arm.name for arm in outcomes.arms if arm.role == "pool")]
    return {
        "sentence": said.sentence,
        "decision": said.decision,
        "arm": said.arm,
        "rows_needed": said.rows,
        "contrasts": {contrast.arm: [*contrast.loss] for contrast in said.contrasts},
        "true_loss": {name: float(np.mean(of)) for name, of in losses.items()},
        "true_contrast_error": {
            n: float(np.std(of - of_pool, ddof=1) / len(of) ** 0.5)
            for n, of in losses.items()
        },
        "rates": {name: dict(tuned.rates) for name, tuned in outcomes.tuned.items()},
        "shares": {name: tuned.share for name, tuned in outcomes.tuned.items()},
        "edge": {
            name: tuned.edge for name, tuned in outcomes.tuned.items() if tuned.edge
        },
        "test_rows": len(further),
        "cpu_seconds": round(seconds),
    }


def lora(options: Options, name: str, path: Path) -> dict[str, Any]:
    """Return the loss of a LoRA that is tuned as a trial tunes it, on the rows of seed 1 of the results page."""
    task = load(path)
    rows = task.train[:20]
    test = task.test[:EVALUATED_ROWS]
    run = FuseOptions(
        base=str(base()),
        task=name,
        method="lora",
        recipe=LoRARecipe(lora_rank=8),
        seeds=(0,),
    )
    lanes = Lanes({"LoRA": run}, (*rows, *test), 0)
    arm = TrialArm(name="LoRA", rates={"lr_lora": LoRARecipe.lr_lora}, role="lora")
    (tuned,) = tuned_rates(
        [arm], [row.input_sha256 for row in rows], lanes.measure, seed=0
    ).values()
    numbers = tuple(range(20)), tuple(range(20, 20 + len(test)))
    training = Training("LoRA", 0, tuned.rates, tuned.share, *numbers, answers=False)
    (scores,) = lanes.measure([training])
    losses = scores.loss * np.mean([len(labels) for labels in lanes.tokens.labels])
    loss = losses.sum() / sum(len(labels) for labels in lanes.tokens.labels[20:])
    return {
        "test_loss": float(loss),
        "rates": dict(tuned.rates),
        "share": tuned.share,
        "edge": tuned.edge,
    }


def against_page(rows: Sequence[dict[str, Any]]) -> str:
    """Return the mean difference of the tuned LoRA from the page's, with its interval over tasks."""
    of_page = {
        row["task"]: row["test_loss"]
        for row in read_lines(RESULTS / "language.jsonl")
        if (row["arm"], row["rows"], row["seed"]) == ("LoRA, rank 8", 20, 1)
    }
    mean, ends = with_interval(
        [row["test_loss"] - of_page[row["task"]] for row in rows], 3
    )
    return f"tuned LoRA minus the page's, {len(rows)} tasks: {mean} nats ({ends})"


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a line for each trial: its sentence, and how far its arm is from the best one in truth."""
    lines = [
        [
            "task",
            "rows",
            "sentence",
            "above the best arm, nats",
            "intervals that hold the truth",
            "CPU minutes",
        ]
    ]
    for row in rows:
        true = row["true_loss"]
        pool = row["true_loss"][POOL]
        above = None if row["arm"] is None else true[row["arm"]] - min(true.values())
        held = sum(
            low <= true[arm] - pool <= high
            for arm, (_, low, high) in row["contrasts"].items()
        )
        lines.append(
            [
                row["task"],
                str(row["rows"]),
                row["sentence"],
                "-" if above is None else f"{above:.3f}",
                f"{held} of {len(row['contrasts'])}",
                f"{row['cpu_seconds'] / 60:.1f}",
            ]
        )
    return lines


if __name__ == "__main__":
    _script.run(main)
