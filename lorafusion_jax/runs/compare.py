"""Comparison of runs on the same test rows: means with intervals, and differences from one of them."""

import dataclasses
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..report import Scores, Table, main_tables, paired_table, plot_means, scores
from .folder import RunFolder

_OVER_TASKS = (
    "over tasks",
    "loss over tasks",
)  # columns that a single task leaves empty


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
    scores = _scores(names)
    name = names[reference]
    (task,) = scores.tasks
    if options.plot is not None:
        plot_means(scores, options.plot, title=task)
    caption = f"{task}: exact match, %, mean ± standard deviation over seeds"
    differences = f"{name} minus each other run, on the same seeds and test rows"
    return [
        _table(main_tables(scores)[0], caption),
        _table(paired_table(scores, name), differences),
    ]


def _scores(names: dict[Path, str]) -> Scores:
    """Return the scores of runs, if all were evaluated on the same rows."""
    rows = list[Any]()
    tested = dict[Path, tuple[str, list[str]]]()
    for folder, name in names.items():
        run = RunFolder(folder)
        results = run.results()
        if results is None:
            state = "is not complete: continue it with `lorafusion fuse --resume`"
            raise ValueError(
                f"{folder} {state if run.exists() else 'is not the folder of a run: name one'}"
            )
        if results["test_rows"] == 0:
            raise ValueError(
                f"{folder} has no test rows (--test-rows 0): train again with some, to compare it"
            )
        predictions = run.predictions()
        for seed in results["seeds"]:
            seed_rows = sorted(
                (row for row in predictions if row["seed"] == seed["seed"]),
                key=lambda row: row["row"],
            )
            if (
                len({row["row"] for row in seed_rows}) != len(seed_rows)
                or len(seed_rows) != results["test_rows"]
            ):
                raise ValueError(
                    f"{folder / 'predictions.jsonl'} holds {len(seed_rows)} rows of seed {seed['seed']}: expected each "
                    f"of the {results['test_rows']} test rows once; restore it from a copy"
                )
            tested[folder] = (
                results["test_sha256"],
                [row["target"] for row in seed_rows],
            )
            marks: dict[str, str | None] = {}
            for key in ("correct", "option_correct"):
                row_marks = [row[key] for row in seed_rows]
                if None in row_marks:
                    marks[key] = None
                else:
                    marks[key] = "".join("01"[bool(mark)] for mark in row_marks)
            rows.append(
                {
                    "task": results["task"],
                    "method": name,
                    "shots": "",
                    "trainable": results["trainable"],
                    "seconds": results["seconds"]["train"] / len(results["seeds"]),
                    "forward_rows": seed.get("forward_rows", 0),
                    **{
                        key: seed.get(key)
                        for key in ("seed", "exact_match", "option_accuracy", "loss")
                    },
                    **marks,
                }
            )
    (first, same), *rest = tested.items()
    for folder, inputs in rest:
        if inputs != same:
            raise ValueError(
                f"{folder} was evaluated on other test rows than {first}: evaluate both on the same task, with the "
                "same --train-rows, --test-rows and --target"
            )
    return scores([row | {"task": rows[0]["task"]} for row in rows])[
        0
    ]  # a task's file may have got another name


def _table(table: Table, caption: str) -> Table:
    """Return the table with another caption, and without the columns that need several tasks."""
    some = itemgetter(
        *(
            place
            for place, column in enumerate(table.columns)
            if column.name not in _OVER_TASKS
        )
    )
    return Table(caption, some(table.columns), [some(line) for line in table.lines])
