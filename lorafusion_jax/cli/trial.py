"""`lorafusion trial`: find out whether a pool is worth it on a task."""

from collections.abc import Sequence

from ..support import interrupts
from ..support.options import TrialOptions
from ..support.reading import show
from .parsing import parse


def trial_command(arguments: Sequence[str]) -> None:
    """Print a table and a sentence for each task, and write the report."""
    options = parse(TrialOptions, arguments, "trial")
    # They load JAX, which the help text does not need.
    from ..report import Table, markdown
    from ..support.platform import suggest_bfloat16
    from ..trials.procedure import Outcomes
    from ..trials.report import describe_trial, write_trial
    from ..trials.run import TaskTrial, trial

    suggest_bfloat16(options.dtype)
    if options.plan:
        show(describe_trial(options))
        return
    done: dict[str, tuple[TaskTrial, Outcomes]] = {}
    answers: list[tuple[Table, str]] = []
    with interrupts.released():
        for task_trial, outcomes in trial(options):
            done[task_trial.task] = task_trial, outcomes
            answers = write_trial(options.out, [*done.values()])
        for table, sentence in answers:
            show(f"{markdown(table)}\n{sentence}\n")
        show(f"written to {options.out / 'report.html'}")
