"""Scores of predictions: exact match and the constant answer."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from .data import Task


class ExactMatch(NamedTuple):
    """Rows that are right, and their share in percent."""

    correct: Bool[np.ndarray, " rows"]
    percent: float


def exact_match(predictions: Sequence[str], targets: Sequence[str]) -> ExactMatch:
    """Compare texts after strip, lower case and removal of full stops, in this order (the paper's code)."""
    if len(predictions) != len(targets) or not targets:
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets: expected one for each")
    pairs = zip(predictions, targets, strict=True)
    correct = np.array([_normal(prediction) == _normal(target) for prediction, target in pairs])
    return ExactMatch(correct, 100 * float(correct.mean()))


def constant_answer(task: Task) -> str:
    """Return the most common target of the training rows, of equally common ones the first: a baseline."""
    if not task.train:
        raise ValueError(f"{task.name} has no training rows, so it has no most common target: give it some")
    # most_common keeps equal counts in the order in which they came.
    return Counter(example.target for example in task.train).most_common(1)[0][0]


def _normal(text: str) -> str:
    return text.strip().lower().replace(".", "")
