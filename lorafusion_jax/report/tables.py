"""Tables of results with the same shots: methods by tasks with their means, and a method compared with every other."""

from statistics import fmean
from typing import Any

from .formats import Column, Table
from .scores import Scores

_MOST_TASKS = 8  # that fit next to the means
_EXAMPLES = {"95+5": "95 + 5 examples", "5": "5 examples"}
_MEANS = (
    Column("mean", "spread"),
    Column("95 % interval", "interval"),
    Column("loss", "nats"),
    Column("option accuracy, %", "percent"),
    Column("trainable parameters", "counts"),
    Column("forward rows", "count"),
    Column("seconds", "seconds"),
)


def main_tables(scores: Scores) -> list[Table]:
    """Return methods by tasks: exact match (mean ± sample standard deviation over seeds), the tasks' mean, the cost.

    The mean has a 95 % bootstrap interval over seeds and test items. The loss is that of the test rows' answers, nats
    per token. Forward rows and seconds are those of adapting to one task with one seed. More than 8 tasks go to a
    second table, of tasks by methods.
    """
    shown = scores.tasks if len(scores.tasks) <= _MOST_TASKS else []
    columns = [
        Column("method", "text"),
        *(Column(task, "spread") for task in shown),
        *_MEANS,
    ]
    lines = [
        [m, *(scores.exact_match(m, task) for task in shown), *_means(scores, m)]
        for m in scores.methods
    ]
    seeds = max(
        len({row["seed"] for row in scores.of(method)}) for method in scores.methods
    )
    over = f"{seeds} seed{'s' if seeds > 1 else ''}"
    caption = f"Exact match, %, {shots_name(scores.shots)}: mean ± standard deviation over {over}"
    tables = [Table(caption, columns, lines)]
    if not shown:
        columns = [
            Column("task", "text"),
            *(Column(method, "spread") for method in scores.methods),
        ]
        lines = [
            [task, *(scores.exact_match(method, task) for method in scores.methods)]
            for task in scores.tasks
        ]
        tables.append(Table(f"{caption}, by task", columns, lines))
    return tables


def paired_table(scores: Scores, reference: str) -> Table:
    """Return the reference minus every other method, in points of exact match and nats of loss.

    The mean of the tasks has a 95 % bootstrap interval over seeds and items of these very tasks and a two-sided p, and
    a t interval over the tasks. The loss has a t interval over the tasks alone.
    """
    if reference not in scores.methods:
        raise ValueError(
            f"no results of {reference!r} to compare with: choose one of {', '.join(scores.methods)}"
        )
    lines = []
    for method in scores.methods:
        if method != reference:
            pair = scores.paired(reference, method)
            points = scores.over_tasks(reference, method, "exact_match")
            nats = scores.over_tasks(reference, method, "loss")
            difference, interval, p = (
                (None,) * 3 if pair is None else (pair[0], pair[1:3], pair.p)
            )
            loss, loss_interval = (
                (None, None) if nats is None else (nats.mean, nats[1:])
            )
            lines.append(
                [
                    method,
                    difference,
                    interval,
                    None if points is None else points[1:],
                    p,
                    loss,
                    loss_interval,
                ]
            )
    columns = [
        Column("method", "text"),
        Column("difference", "points"),
        Column("95 % interval", "interval"),
        Column("over tasks", "interval"),
        Column("p", "p"),
        Column("loss", "more nats"),
        Column("loss over tasks", "nats interval"),
    ]
    caption = f"{reference} minus each other method, points of exact match, {shots_name(scores.shots)}"
    caption += ": same tasks, seeds and test items; p for each comparison by itself; t intervals over tasks"
    return Table(caption, columns, lines)


def shots_name(shots: str) -> str:
    """Return the number of examples (shots), in words."""
    return _EXAMPLES.get(shots, shots)


def _means(scores: Scores, method: str) -> list[Any]:
    summary = scores.summaries[method]
    options = scores.option_accuracy(method)
    rows = scores.of(method)
    counts = [row["trainable"] for row in rows]
    return [
        None if summary is None else (summary.mean, summary.std),
        None if summary is None else (summary.low, summary.high),
        scores.loss(method),
        None if options is None else options[0],
        (min(counts), max(counts)),
        fmean(row["forward_rows"] for row in rows),
        fmean(row["seconds"] for row in rows),
    ]
