"""Experiments: trials, jobs, and rows that are measured once."""

# ruff: noqa: F401 (the imports are the public names)

from .engines import EngineOptions, OutOfMemory, run_items
from .jobs import Job, run_jobs, settings_of
from .procedure import Outcomes, Scores, Training, TrialArm, best_arm, procedure
from .rows import (
    ResultRows,
    Row,
    Shots,
    append_lines,
    key,
    merge,
    name,
    read_lines,
    read_rows,
)
from .run import TaskTrial, TrialOptions, trial
from .trainer import Trainer
from .verdict import Verdict, judge, judge_tasks
