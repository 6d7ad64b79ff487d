"""Experiments: arms, jobs, cells that are measured once and are rows of a file, and plans."""

# ruff: noqa: F401 (the imports are the public names)

from .arms import ARMS, EPOCHS, TRAIN_ROWS, Arm, Shots, recipe_of
from .cells import Cells, Row, append_lines, print_plan, read_lines
from .engines import EngineOptions, OutOfMemory, run_items
from .jobs import Job, run_jobs, settings_of
from .lanes import Lanes
from .matrix import MatrixOptions, run_matrix
from .plan import print_matrix_plan
from .procedure import Outcomes, Scores, Training, TrialArm, procedure
from .rows import append_rows, merge, read_rows
from .run import TaskTrial, TrialOptions, trial
from .verdict import Verdict, judge, judge_tasks
