"""Tasks: reading them, splitting, tokenising, batching, scoring."""

# ruff: noqa: F401

from .batches import (
    IGNORED,
    Batch,
    Rows,
    StepBatch,
    TrainingRows,
    eval_batches,
    most_new_tokens,
    pad,
    train_batches,
    train_step_batches,
)
from .bbh import BBH_DATA, LORAHUB_DATA, write_lorahub_split
from .data import (
    BETWEEN_EXAMPLES,
    Example,
    Task,
    as_input,
    columns,
    few_shot,
    load_task,
    row_example,
)
from .metrics import answer_options, constant_answer, exact_match
from .packing import MOST_SHAPES, Packing, bucket
from .protocol import Protocol, Split, batch_orders, draw_modules, split
from .readers import task_name
from .tokenizer import (
    LONGEST,
    SEPARATE_TEXTS,
    Encoded,
    TextFormat,
    decode,
    encode,
    render_chat,
    stream_text,
    tokenise,
)

# The names for other programs; the package itself uses the others too.
__all__ = [
    "Encoded",
    "Example",
    "Task",
    "TextFormat",
    "batch_orders",
    "encode",
    "exact_match",
    "load_task",
    "pad",
    "train_batches",
    "write_lorahub_split",
]
