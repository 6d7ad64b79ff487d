"""Report of a trial: tables, a figure, a page, and the commands that train the arm of the sentence."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..estimates.estimate import Device
from ..estimates.machines import PlanOptions, spent
from ..estimates.plan import Row, plan_table, run_cost, run_pace
from ..report import Column, Table, colour, literal, plot, write_report
from ..runs.options import FuseOptions, row_format
from ..support.platform import for_cpu
from ..tasks import load_task
from .procedure import Outcomes, Training
from .run import TaskTrial, TrialOptions, task_trials
from .tuning import Rates
from .verdict import Interval, Verdict, judge, judge_tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GIVEN = (
    "base",
    "pool",
    "prompt",
    "input",
    "target",
    "chat",
    "dtype",
    "method",
    "control",
)  # to `fuse`
_LOSS = [
    Column("loss", "nats"),
    Column("minus LoRAFusion", "more nats"),
    Column("95 % interval", "nats interval"),
    Column("p (Holm)", "p"),
]
_POINTS = [Column("more points", "points"), Column("95 % of points", "interval")]
_RATES = [
    Column("learning rates", "text"),
    Column("epochs", "count"),
    Column("trained rows", "count"),
]


def arms_table(task_trial: TaskTrial, outcomes: Outcomes, verdict: Verdict) -> Table:
    """Return a line for each arm of a task; of options instead of exact match, if the task has some."""
    contrasts = {contrast.arm: contrast for contrast in verdict.contrasts}
    lines = []
    scores = outcomes.option_correct or outcomes.correct
    for arm in outcomes.arms:
        contrast = contrasts.get(arm.name)
        tuned = outcomes.tuned.get(arm.name)
        rates = None
        if tuned is not None:
            rates = _rates_text(tuned.rates)
            if tuned.in_grid is not None:
                rates += (
                    f" (before the grid was extended: {_rates_text(tuned.in_grid)})"
                )
        epochs = tuned and task_trial.epochs(arm.name, tuned)
        points = contrast and (
            contrast.option_correct if outcomes.option_correct else contrast.correct
        )
        lines.append(
            [
                arm.name,
                arm.parameters,
                *_cells(
                    float(np.nanmean(outcomes.loss[arm.name])),
                    contrast and contrast.loss,
                ),
                contrast and contrast.p,
                100 * np.nanmean(scores[arm.name]),
                points and points.mean,
                points and (points.low, points.high),
                rates,
                epochs,
                round(outcomes.spent[arm.name] * len(task_trial.rows)),
            ]
        )
    scored = Column(
        "right options, %" if outcomes.option_correct else "exact match, %", "percent"
    )
    columns = [
        Column("arm", "text"),
        Column("trained parameters", "count"),
        *_LOSS,
        scored,
        *_POINTS,
        *_RATES,
    ]
    return Table(
        f"{task_trial.task}: {len(task_trial.rows)} rows, loss in nats per answer token on rows of other folds",
        columns,
        lines,
    )


def _rates_text(rates: Rates) -> str:
    return ", ".join(f"{name.removeprefix('lr_')} {value:.2g}" for name, value in rates)


def tasks_table(done: Sequence[tuple[TaskTrial, Outcomes]], verdict: Verdict) -> Table:
    """Return a line for each arm: its loss on each task, and its difference from LoRAFusion over the tasks."""
    contrasts = {contrast.arm: contrast for contrast in verdict.contrasts}
    lines = []
    for arm in done[0][1].arms:
        losses = [float(np.nanmean(outcomes.loss[arm.name])) for _, outcomes in done]
        contrast = contrasts.get(arm.name)
        loss_cells = _cells(float(np.mean(losses)), contrast and contrast.loss)
        lines.append([arm.name, *losses, *loss_cells, contrast and contrast.p])
    columns = [
        Column("arm", "text"),
        *(Column(task_trial.task, "nats") for task_trial, _ in done),
        *_LOSS,
    ]
    return Table(
        f"{len(done)} tasks: loss in nats per answer token, and intervals over tasks",
        columns,
        lines,
    )


def _cells(loss: float, contrast: Interval | None) -> list[Any]:
    return [
        loss,
        contrast and contrast.mean,
        contrast and (contrast.low, contrast.high),
    ]


def train_command(task_trial: TaskTrial, outcomes: Outcomes, winner: str) -> str:
    """Return the commands that train an arm at its best rates and export it; none for an arm that trains nothing.

    `fuse` keeps 5 % of the rows to validate on.
    """
    arm, run = task_trial.arms[winner]
    if run.entry.learns == "untrained":
        return f"lorafusion generate {_flags({'base': run.base, 'chat': run.chat or None})}"
    rows = load_task(task_trial.source, **row_format(run), train_rows=0, need=())
    # All rows of a list are used, so none is left to test on.
    test_rows = 0 if rows.one_list and len(rows.test) == len(task_trial.rows) else None
    tuned = outcomes.tuned.get(winner)
    default = run.entry.recipe()
    recipe = {
        name: value
        for name, value in vars(run.recipe).items()
        if value != getattr(default, name)
    }
    set_options = {
        name: getattr(run, name)
        for name in _GIVEN
        if getattr(run, name) != getattr(FuseOptions, name, None)
    }
    if tuned:
        recipe |= {"epochs": task_trial.epochs(winner, tuned)} | {
            name: f"{rate:.3g}" for name, rate in tuned.rates
        }
    name = "-".join((task_trial.task, run.method, "all"))
    train = _flags(
        set_options
        | {
            "task": task_trial.source,
            "train_rows": len(task_trial.rows),
            "test_rows": test_rows,
            "name": name,
        }
        | recipe
    )
    return f"lorafusion fuse {train}\nlorafusion export --run runs/{name} --out {name}-adapter"


def _flags(values: Mapping[str, Any]) -> str:
    parts = []
    for name, value in values.items():
        if value is not None:
            texts = map(str, value if isinstance(value, tuple) else (value,))
            if value is True:
                texts = ()
            parts += [f"--{name.replace('_', '-')}", *map(shlex.quote, texts)]
    return " ".join(parts)


def draw_arms(path: Path, task_trial: TaskTrial, verdict: Verdict) -> None:
    """Draw each arm's difference from LoRAFusion with its interval; ValueError if matplotlib is not installed."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        shade = colour(3)
        axes.axvline(0, color="#333333", linewidth=1)
        for place, contrast in enumerate(verdict.contrasts):
            axes.hlines(
                place, contrast.loss.low, contrast.loss.high, color=shade, linewidth=2
            )
            axes.plot(contrast.loss.mean, place, "o", color=shade, markersize=6)
        axes.set_yticks(
            range(len(verdict.contrasts)),
            [literal(contrast.arm) for contrast in verdict.contrasts],
        )
        axes.set_ylim(len(verdict.contrasts) - 0.4, -0.6)
        axes.grid(visible=True, axis="x")
        axes.set_xlabel(
            "loss minus that of LoRAFusion, nats per answer token, with 95 % interval"
        )
        figure.suptitle(literal(task_trial.task), x=0.01, ha="left", size=12)

    plot(path, (7.0, 0.3 * len(verdict.contrasts) + 1.2), draw)


def describe_trial(options: TrialOptions) -> str:
    """Return the plans of the trainings of each task, a line for each arm, without training anything."""
    parts = []
    for task_trial in task_trials(options):
        trainings_by_arm: dict[str, list[Training]] = {
            name: [] for name in task_trial.arms
        }
        for training in task_trial.trainings(options):
            trainings_by_arm[training.arm].append(training)
        rows = [
            _plan_of_arm(
                task_trial.arms[name].options, name, trainings, len(task_trial.rows)
            )
            for name, trainings in trainings_by_arm.items()
        ]
        at = run_pace(task_trial.arms[rows[-1].method].options)
        jobs = [job for row in rows for job in row.jobs]
        parts.append(
            f"{task_trial.task} with {len(task_trial.rows)} rows; {options.folds} folds, and tuning on thirds\n"
            f"{plan_table(rows, at)}\n{spent(jobs, at, PlanOptions(plan=True))}"
        )
    return "\n\n".join(parts)


def _plan_of_arm(
    run: FuseOptions, name: str, trainings: Sequence[Training], rows: int
) -> Row:
    """Return the costs of an arm's trainings together, from the cost of one on most rows."""
    device: Device = "cpu" if for_cpu() else "accelerator"
    most = max(len(training.train) for training in trainings) or rows
    tested = len(trainings[-1].test)
    cost = run_cost(dataclasses.replace(run, train_rows=most, test_rows=tested), device)
    training_flops = [
        cost.training_flops * training.share * len(training.train) / most
        for training in trainings
    ]
    evaluation_flops = [
        cost.evaluation_flops * training.answers * len(training.test) / tested
        for training in trainings
    ]
    cost = cost._replace(
        training_flops=sum(training_flops), evaluation_flops=sum(evaluation_flops)
    )
    jobs = np.add(training_flops, evaluation_flops)
    return Row(name, len(trainings), cost, tuple(jobs.tolist()))


def write_trial(
    folder: Path, done: Sequence[tuple[TaskTrial, Outcomes]]
) -> tuple[Table, Verdict] | None:
    """Write tables, a figure for each task and report.html, and return table and verdict over several tasks."""
    text = []
    tables = {}
    figures = {}
    together = None
    for task_trial, outcomes in done:
        verdict = judge(outcomes)
        text.append(f"{task_trial.task}: {' '.join(verdict.lines)}")
        tables[task_trial.task] = arms_table(task_trial, outcomes, verdict)
        draw_arms(folder / f"{task_trial.task}.png", task_trial, verdict)
        figures[f"{task_trial.task}.png"] = (
            f"{task_trial.task}: differences of the arms from LoRAFusion"
        )
    if len(done) > 1:
        verdict_over_tasks = judge_tasks([outcomes for _, outcomes in done])
        tables["all_tasks"] = tasks_table(done, verdict_over_tasks)
        text.append(f"Over {len(done)} tasks: {' '.join(verdict_over_tasks.lines)}")
        together = tables["all_tasks"], verdict_over_tasks
    write_report(
        folder, "Is the pool worth it?", tables, figures, text="\n\n".join(text)
    )
    return together
