"""Tasks: reading them, splitting, tokenising, batching, scoring. NumPy only."""

from .batches import (
    IGNORED,
    Batch,
    StepBatch,
    bucket,
    eval_batches,
    most_new_tokens,
    pad,
    train_batches,
    train_step_batches,
)
from .bbh import BBH_DATA, LORAHUB_DATA, lorahub_tasks, prompt_overlap, write_lorahub_split
from .data import Example, Task, fill, load_task
from .few_shot import BETWEEN_EXAMPLES, few_shot
from .metrics import ExactMatch, constant_answer, exact_match
from .options import answer_options
from .protocol import Protocol, Split, batch_orders, draw_modules, split
from .readers import find_task, is_bbh, without_revision
from .tokenizer import LONGEST, SEPARATE_TEXTS, Encoded, TextFormat, decode, encode, stream_text

__all__ = [
    "BBH_DATA",
    "BETWEEN_EXAMPLES",
    "IGNORED",
    "LONGEST",
    "LORAHUB_DATA",
    "SEPARATE_TEXTS",
    "Batch",
    "Encoded",
    "Example",
    "ExactMatch",
    "StepBatch",
    "Protocol",
    "Split",
    "Task",
    "TextFormat",
    "answer_options",
    "batch_orders",
    "bucket",
    "constant_answer",
    "decode",
    "draw_modules",
    "encode",
    "eval_batches",
    "exact_match",
    "few_shot",
    "fill",
    "find_task",
    "is_bbh",
    "load_task",
    "lorahub_tasks",
    "most_new_tokens",
    "pad",
    "prompt_overlap",
    "split",
    "stream_text",
    "train_batches",
    "train_step_batches",
    "without_revision",
    "write_lorahub_split",
]
