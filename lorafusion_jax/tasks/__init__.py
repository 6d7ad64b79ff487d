"""Tasks: reading them, splitting, tokenising, batching, scoring. NumPy only."""

from .batches import IGNORED, Batch, bucket, eval_batches, pad, train_batches
from .data import Example, Task, load_task
from .metrics import ExactMatch, exact_match
from .protocol import Protocol, Split, batch_orders, draw_modules, split
from .tokenizer import Encoded, encode, load_tokenizer

__all__ = [
    "IGNORED",
    "Batch",
    "Encoded",
    "Example",
    "ExactMatch",
    "Protocol",
    "Split",
    "Task",
    "batch_orders",
    "bucket",
    "draw_modules",
    "encode",
    "eval_batches",
    "exact_match",
    "load_task",
    "load_tokenizer",
    "pad",
    "split",
    "train_batches",
]
