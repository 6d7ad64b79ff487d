"""Report of a trial: tables, a figure, a page, and the commands that train the arm of the sentence."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..estimates.estimate import Device
from ..estimates.machines import PlanOptions, spent
from ..estimates.plan import Row, plan_table, run_cost, run_pace
from ..io.hf import Base, open_base
from ..methods.lora import LoRARecipe
from ..report import Column, Interval, Table, plot_means, write_report
from ..runs.options import FuseOptions, row_format
from ..support.platform import for_cpu
from ..tasks import load_task
from .procedure import Outcomes, Training
from .run import TaskTrial, TrialOptions, task_trials
from .verdict import Verdict, judge, judge_tasks

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


def arms_table(task_trial: TaskTrial, outcomes: Outcomes, verdict: Verdict) -> Table:
    """Return a line for each method of a task."""
    lines = []
    scores = outcomes.option_correct or outcomes.correct
    for arm in outcomes.arms:
        right = scores.get(arm.name, np.array(np.nan))
        lines.append(
            [
                arm.name,
                arm.parameters,
                _loss_text(verdict.loss[arm.name], verdict.behind.get(arm.name)),
                None if np.isnan(right).all() else 100 * np.nanmean(right),
                outcomes.seconds[arm.name] / 60,
            ]
        )
    scored = "right options, %" if outcomes.option_correct else "exact match, %"
    return Table(
        f"{task_trial.task}: {len(task_trial.rows)} rows, each tested by models that were not trained on it",
        [
            Column("method", "text"),
            Column("trained parameters", "count"),
            Column("loss, nats (behind the best, 95 %)", "text"),
            Column(scored, "percent"),
            Column("minutes", "seconds"),
        ],
        lines,
    )


def details_table(task_trial: TaskTrial, outcomes: Outcomes) -> Table:
    """Return the rates, epochs and tested rows of each method."""
    lines = []
    for arm in outcomes.arms:
        tuned = outcomes.tuned.get(arm.name)
        lines.append(
            [
                arm.name,
                ", ".join(
                    f"{name.removeprefix('lr_')} {rate:.2g}"
                    for name, rate in tuned.rates
                )
                if tuned
                else None,
                task_trial.epochs(arm.name, tuned) if tuned else None,
                int(np.sum(~np.isnan(outcomes.loss[arm.name]))),
                "yes" if arm.name in outcomes.out else "no",
            ]
        )
    columns = [
        Column("method", "text"),
        Column("learning rates", "text"),
        Column("epochs", "count"),
        Column("tested rows", "count"),
        Column("left out after a fold", "text"),
    ]
    return Table(f"{task_trial.task}: how each method was trained", columns, lines)


def _loss_text(loss: float, behind: Interval | None) -> str:
    text = f"{loss:.3f}"
    return (
        text if behind is None else f"{text} ({behind.low:+.3f} to {behind.high:+.3f})"
    )


def tasks_table(done: Sequence[tuple[TaskTrial, Outcomes]], verdict: Verdict) -> Table:
    """Return a line for each method: its loss on each task, and over the tasks."""
    verdicts = [judge(outcomes) for _, outcomes in done]
    lines = []
    for name, loss in verdict.loss.items():
        task_losses = [task_verdict.loss[name] for task_verdict in verdicts]
        lines.append([name, *task_losses, _loss_text(loss, verdict.behind.get(name))])
    columns = [
        Column("method", "text"),
        *(Column(task_trial.task, "nats") for task_trial, _ in done),
        Column("loss, nats (behind the best, 95 %)", "text"),
    ]
    return Table(f"{len(done)} tasks: loss in nats per token", columns, lines)


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


def describe_trial(options: TrialOptions) -> str:
    """Return the plans of the trainings of each task, a line for each arm, without training anything."""
    base = open_base(options.base)
    parts = []
    for task_trial in task_trials(options):
        trainings = task_trial.trainings(options)
        rows = [
            _plan_of_arm(task_trial, name, trainings, base) for name in task_trial.arms
        ]
        at = run_pace(task_trial.arms[rows[-1].method].options)
        jobs = [job for row in rows for job in row.jobs]
        parts.append(
            f"{task_trial.task} with {len(task_trial.rows)} rows; {options.folds} folds, and tuning on thirds\n"
            f"{plan_table(rows, at)}\n{spent(jobs, at, PlanOptions(plan=True))}"
        )
    return "\n\n".join(parts)


def _plan_of_arm(
    task_trial: TaskTrial, name: str, trainings: Sequence[Training], base: Base
) -> Row:
    """Return the cost of the trainings of one arm together, from the cost of one on most rows."""
    device: Device = "cpu" if for_cpu() else "accelerator"
    trainings = [training for training in trainings if training.arm == name]
    run = task_trial.arms[name].options
    if isinstance(run.recipe, LoRARecipe):
        # A warm start costs as much, and is not traced again.
        run = dataclasses.replace(
            run, pool=None, recipe=dataclasses.replace(run.recipe, warm_start="none")
        )
    most = max(len(training.train) for training in trainings) or len(task_trial.rows)
    tested = len(trainings[-1].test)
    run = dataclasses.replace(run, train_rows=most, test_rows=tested)
    cost = run_cost(run, device, base)
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
) -> list[tuple[Table, str]]:
    """Write tables, a figure for each task and report.html; return each table with its sentence and commands."""
    answers = []
    tables = {}
    figures = {}
    for task_trial, outcomes in done:
        task = task_trial.task
        verdict = judge(outcomes)
        table = arms_table(task_trial, outcomes, verdict)
        command = train_command(task_trial, outcomes, verdict.arm)
        answers.append((table, f"{verdict.sentence}\n\n{command}"))
        tables[task] = table
        tables[f"{task}_details"] = details_table(task_trial, outcomes)
        if verdict.behind:
            plot_means(
                verdict.behind,
                folder / f"{task}.png",
                title=task,
                label="loss minus the least one, nats per token, with 95 % interval",
                digits=3,
            )
            figures[f"{task}.png"] = (
                f"{task}: how far the methods are behind the best one"
            )
    if len(done) > 1:
        verdict = judge_tasks([outcomes for _, outcomes in done])
        tables["all_tasks"] = tasks_table(done, verdict)
        answers.append(
            (tables["all_tasks"], f"Over {len(done)} tasks: {verdict.sentence}")
        )
    text = "\n\n".join(sentence for _, sentence in answers)
    write_report(folder, "What to do with the adapters?", tables, figures, text=text)
    return answers
