"""Fusions of SmolLM2 on noisy chips: exact match that they lose against digital, prepared and not.

    python experiments/fusions_on_chips.py                                     # table of the committed rows
    python experiments/fusions_on_chips.py --tasks FOLDER                      # measures what is missing
    python experiments/fusions_on_chips.py --tasks FOLDER --only sentiment --out OUT

The design is in experiments/chips_of_language_models.md. FOLDER holds the function-vector data sets (see
experiments/language.py). OUT gets a line of rows.jsonl for each task, with and without preparation, and table.csv.
Interrupted, the same command continues.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import _script
import tyro
from chips_of_language_models import MOMENTS, configuration
from lab.common import ROOT, with_interval, write_tables
from lab.language import MAIN, options_of
from lab.smollm2 import EXAMPLES, base
from language import link_tasks, unseen_tasks

from lorafusion_jax import fuse
from lorafusion_jax.crossbar import save_config
from lorafusion_jax.hardware import (
    EvaluateOnChipsOptions,
    PrepareOptions,
    evaluate_on_chips,
    prepare,
)
from lorafusion_jax.runs import environment
from lorafusion_jax.trials import ResultRows, Row

RESULTS = ROOT / "results" / "fusions_on_chips"
TASKS = (
    "sentiment",
    "person-sport",
    "prev_item",
    "word_length",
    "country-currency",
    "english-spanish",
)
CHIPS = 3
SEED = 1
_SETTING = "errors of 3 %"
_SCORES = ("exact_match", "loss")


class Job(NamedTuple):
    """A row that is to be measured."""

    task: str
    prepared: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      tasks: folder of the function-vector data sets; none for the table of OUT alone.
      only: tasks to measure; by default all six.
      runs: folder of digital fusions and of the prepared model.
      out: folder of results; rows that are there are not measured again.
    """

    tasks: Path | None = None
    only: tuple[str, ...] = TASKS
    runs: Path = ROOT / "runs" / "fusions_on_chips"
    out: Path = RESULTS


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and write the table."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    results = ResultRows(options.out / "rows.jsonl", job_of)
    if options.tasks is not None:
        jobs = [
            Job(task, prepared) for task in options.only for prepared in (False, True)
        ]
        results.fill(jobs, lambda missing: measured(missing, options), _line_of)
    if rows := results.rows():
        write_tables(options.out, {"table": table(rows)})


def job_of(row: Row) -> Job:
    """Return what a row was measured of."""
    return Job(row["task"], row["prepared"])


def _line_of(row: Row) -> str:
    return f"{job_of(row)}: {lost(row, 'exact_match'):.1f} points lost, {row['cpu_seconds']:.0f} s"


def measured(missing: Sequence[Job], options: Options) -> Iterator[Row]:
    """Yield a row for each job."""
    assert options.tasks is not None
    adapters = EXAMPLES / "adapters"
    names = list(dict.fromkeys(job.task for job in missing))
    paths = unseen_tasks(names, link_tasks(options.tasks), adapters)
    crossbars = {
        prepared: _crossbar(options.runs, prepared=prepared)
        for prepared in (False, True)
    }
    for job in missing:
        start = time.process_time()
        run = options.runs / job.task
        if not (run / "results.json").exists():
            fuse(
                options_of(
                    MAIN["LoRAFusion"],
                    paths[job.task],
                    base=base(),
                    pool=adapters,
                    seeds=(SEED,),
                    out=options.runs,
                    name=job.task,
                )
            )
        digital = json.loads((run / "results.json").read_text())["seeds"][0]
        on_chips = EvaluateOnChipsOptions(
            run=run, crossbar=str(crossbars[job.prepared]), chips=CHIPS
        )
        yield {
            **job._asdict(),
            "digital": _scores(digital),
            "chips": [_scores(row) for row in evaluate_on_chips(on_chips)["rows"]],
            "cpu_seconds": time.process_time() - start,
            **environment(),
        }


def _crossbar(runs: Path, *, prepared: bool) -> Path:
    """Return the configuration of the chips, or the model that is prepared for it, which is written once."""
    runs.mkdir(parents=True, exist_ok=True)
    file = runs / ("prepared.yaml" if prepared else "chip.yaml")
    save_config(configuration(_SETTING, prepared=prepared), file)
    if not prepared:
        return file
    folder = runs / "prepared"
    if not folder.exists():
        prepare(
            PrepareOptions(
                base=str(base()),
                crossbar=str(file),
                text=tuple(sorted((EXAMPLES / "text").glob("*.txt"))),
                out=folder,
                tokens=MOMENTS,
            )
        )
    return folder


def _scores(row: Row) -> Row:
    return {name: row[name] for name in _SCORES}


def lost(row: Row, score: str) -> float:
    """Return how much lower a score is on the chips than digitally, on average."""
    return row["digital"][score] - statistics.fmean(
        chip[score] for chip in row["chips"]
    )


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return a line for each task that has both rows and their means, with an interval over tasks."""
    lines = [
        ["task", "prepared", "digital, %", "on chips, %", "points lost", "over tasks"]
    ]
    jobs = {job_of(row) for row in rows}
    for prepared in (False, True):
        group = [
            row
            for row in rows
            if row["prepared"] == prepared and Job(row["task"], not prepared) in jobs
        ]
        for row in group:
            digital = row["digital"]["exact_match"]
            points = lost(row, "exact_match")
            lines.append(_table_line(row["task"], prepared, digital, points, ""))
        if group:
            digital = statistics.fmean(row["digital"]["exact_match"] for row in group)
            points = [lost(row, "exact_match") for row in group]
            _, interval = with_interval(points, 1)
            lines.append(
                _table_line(
                    "mean", prepared, digital, statistics.fmean(points), interval
                )
            )
    return lines


def _table_line(
    task: str, prepared: bool, digital: float, points: float, interval: str
) -> list[str]:
    return [
        task,
        "yes" if prepared else "no",
        f"{digital:.1f}",
        f"{digital - points:.1f}",
        f"{points:.1f}",
        interval,
    ]


if __name__ == "__main__":
    _script.run(main)
