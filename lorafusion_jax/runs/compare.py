"""Comparison of runs on the same test rows: means with intervals, and differences from one of them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from jaxtyping import Bool

from ..report import (
    Column,
    Summary,
    Table,
    paired,
    plot_means,
    spread_over_seeds,
    summary,
)
from .folder import RunFolder, RunResults

_MEANS = (
    Column("mean", "spread"),
    Column("95 % interval", "interval"),
    Column("loss", "nats"),
    Column("option accuracy, %", "percent"),
    Column("trainable parameters", "count"),
    Column("forward rows", "count"),
    Column("seconds", "seconds"),
)
_DIFFERENCES = (
    Column("method", "text"),
    Column("difference", "points"),
    Column("95 % interval", "interval"),
    Column("p", "p"),
    Column("loss", "more nats"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare complete runs on the same test rows: means with 95 % intervals, and paired differences.

    Example:
      lorafusion compare runs/snarks-fusion runs/snarks-lora --plot snarks.png

    Attributes:
      runs: folders of the runs.
      reference: folder of the run that the others are compared with; by default the first.
      plot: PNG file to draw the means in.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    reference: Path | None = None
    plot: Path | None = None


class _Evaluated(NamedTuple):
    """A run's results, and marks of its answers: [seeds, rows], by seed in the order of the results."""

    results: RunResults
    targets: list[str]
    correct: Bool[np.ndarray, "seeds rows"]
    option_correct: Bool[np.ndarray, "seeds rows"] | None

    @property
    def seeds(self) -> list[int]:
        return [seed["seed"] for seed in self.results.seeds]

    def loss(self, places: Sequence[int]) -> float | None:
        """Return the mean loss of some seeds, by their places; None if one has none."""
        losses = [self.results.seeds[place]["loss"] for place in places]
        finite = [loss for loss in losses if loss is not None]
        return fmean(finite) if len(finite) == len(losses) else None


def compare(options: CompareOptions) -> list[Table]:
    """Return a table of means and one of differences, and draw the means if the options name a file.

    Seeds that two runs share are paired; a run of a single seed stands for all seeds of the other.

    Raises:
      ValueError: there are fewer than two runs, one is given twice or is not complete, the reference is none of them,
        or they were evaluated on different test rows.
    """
    folders = [folder.resolve() for folder in options.runs]
    run_names = ", ".join(map(str, options.runs))
    if len(folders) < 2 or len(set(folders)) < len(folders):
        raise ValueError(
            f"expected two or more different runs, got {run_names or 'none'}"
        )
    reference = folders[0] if options.reference is None else options.reference.resolve()
    if reference not in folders:
        raise ValueError(
            f"{options.reference} is none of the runs: expected one of {run_names}"
        )
    # The last part of a folder names a run, unless two runs have the same one.
    last = [folder.name for folder in folders]
    names = {
        folder: str(folder) if last.count(folder.name) > 1 else folder.name
        for folder in folders
    }
    runs = {folder: _read(folder) for folder in folders}
    first = runs[folders[0]]
    for folder, run in runs.items():
        same_rows = run.results.test_sha256 == first.results.test_sha256
        if not same_rows or run.targets != first.targets:
            raise ValueError(
                f"{folder} was evaluated on other test rows than {folders[0]}: evaluate both on the same task, with "
                "the same --train-rows, --test-rows and --target"
            )
    task = first.results.task
    summaries = {names[folder]: summary([run.correct]) for folder, run in runs.items()}
    if options.plot is not None:
        plot_means(summaries, options.plot, title=task)
    means = Table(
        f"{task}: exact match, %, mean ± standard deviation over seeds",
        [Column("method", "text"), *_MEANS],
        [
            [name, *_means(run, summaries[name])]
            for name, run in zip(names.values(), runs.values(), strict=True)
        ],
    )
    differences = Table(
        f"{names[reference]} minus each other run, on the same seeds and test rows",
        _DIFFERENCES,
        [
            [names[folder], *_difference(runs[reference], run)]
            for folder, run in runs.items()
            if folder != reference
        ],
    )
    return [means, differences]


def _means(run: _Evaluated, exact_match: Summary) -> list[Any]:
    options = None
    if run.option_correct is not None:
        options = spread_over_seeds([run.option_correct])[0]
    seeds = run.results.seeds
    return [
        (exact_match.mean, exact_match.std),
        (exact_match.low, exact_match.high),
        run.loss(range(len(seeds))),
        options,
        run.results.trainable,
        fmean(seed.get("forward_rows", 0) for seed in seeds),
        run.results.seconds["train"] / len(seeds),
    ]


def _difference(reference: _Evaluated, run: _Evaluated) -> list[Any]:
    """Return the cells of a line: the reference minus a run."""
    places = list(range(len(reference.seeds)))
    run_places = list(range(len(run.seeds)))
    if len(places) > 1 and len(run_places) > 1:
        shared = [seed for seed in reference.seeds if seed in run.seeds]
        places = [reference.seeds.index(seed) for seed in shared]
        run_places = [run.seeds.index(seed) for seed in shared]
    if not places:
        return [None] * 4
    pair = paired([reference.correct[places]], [run.correct[run_places]])
    loss = reference.loss(places)
    run_loss = run.loss(run_places)
    difference = None if loss is None or run_loss is None else loss - run_loss
    return [pair.difference, (pair.low, pair.high), pair.p, difference]


def _read(folder: Path) -> _Evaluated:
    """Return the results of a complete run with test rows."""
    run = RunFolder(folder)
    results = run.results()
    if results is None:
        state = "is not complete: continue it with `lorafusion fuse --resume`"
        if not run.exists():
            state = "is not the folder of a run: name one"
        raise ValueError(f"{folder} {state}")
    if results.test_rows == 0:
        raise ValueError(
            f"{folder} has no test rows (--test-rows 0): train again with some, to compare it"
        )
    predictions = sorted(run.predictions(), key=lambda row: row["row"])
    targets = list[str]()
    marks = list[list[bool]]()
    option_marks = list[list[bool | None]]()
    for seed in results.seeds:
        rows = [row for row in predictions if row["seed"] == seed["seed"]]
        if [row["row"] for row in rows] != list(range(results.test_rows)):
            raise ValueError(
                f"{folder / 'predictions.jsonl'} holds {len(rows)} rows of seed {seed['seed']}: expected each "
                f"of the {results.test_rows} test rows once; restore it from a copy"
            )
        targets = [row["target"] for row in rows]
        marks.append([row["correct"] for row in rows])
        option_marks.append([row["option_correct"] for row in rows])
    optional = any(None in seed_marks for seed_marks in option_marks)
    return _Evaluated(
        results,
        targets,
        np.array(marks, bool),
        None if optional else np.array(option_marks, bool),
    )
