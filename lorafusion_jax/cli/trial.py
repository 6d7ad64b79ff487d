"""`lorafusion trial`: find out whether a pool is worth it on a task."""

from collections.abc import Sequence

from ..report import Table, markdown
from ..support.reading import show
from ..trials.report import arms_table, describe_trial, train_command, write_trial
from ..trials.run import TrialOptions, trial
from ..trials.verdict import Verdict, judge
from .parsing import parse

GROUPS = {
    "data and base": (
        "base",
        "pool",
        "task",
        "prompt",
        "input",
        "target",
        "chat",
        "train_rows",
        "dtype",
    ),
    "comparison": ("arms", "folds", "nested", "epochs", "seed"),
    "run": ("out", "minutes", "plan", "engine", "address"),
}


def main(arguments: Sequence[str]) -> None:
    """Print a table and a sentence for each task, and write the report."""
    options = parse(TrialOptions, arguments, "trial", groups=GROUPS)
    if options.plan:
        show(describe_trial(options))
        return
    done = []
    for task_trial, outcomes in trial(options):
        done.append((task_trial, outcomes))
        _show(arms_table(task_trial, outcomes, verdict := judge(outcomes)), verdict)
        if verdict.arm is not None:
            show(f"\n{train_command(task_trial, outcomes, verdict.arm)}\n")
    if (report_of_tasks := write_trial(options.out, done)) is not None:
        _show(*report_of_tasks)
    show(f"written to {options.out / 'report.html'}")


def _show(table: Table, verdict: Verdict) -> None:
    show("\n".join((markdown(table), *verdict.lines)))
