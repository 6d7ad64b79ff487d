"""Scores of predictions: exact match, the constant answer, and the answers that a row could have."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from .data import Example, Task

_MOST_LABELS = 10
# "Options:" and, on separate lines, "(A) text" or "- text".
_BLOCK = re.compile(
    r"^options:[ \t]*((?:\n(?:\([A-Z]\)|-) .*)+)", re.IGNORECASE | re.MULTILINE
)
_OPTION = re.compile(r"^(?:(\([A-Z]\))|- (.*))", re.MULTILINE)


def exact_match(
    predictions: Sequence[Sequence[str]], targets: Sequence[str]
) -> Bool[np.ndarray, "seeds rows"]:
    """Compare texts, by seed, after strip, lower case and removal of full stops, in this order (the paper's code)."""
    normal_targets = [_normal(target) for target in targets]
    for texts in predictions:
        if len(texts) != len(normal_targets) or not normal_targets:
            raise ValueError(
                f"{len(texts)} predictions for {len(normal_targets)} targets: expected one for each"
            )
    pairs = (
        zip(map(_normal, texts), normal_targets, strict=True) for texts in predictions
    )
    return np.array(
        [
            [prediction == target for prediction, target in seed_pairs]
            for seed_pairs in pairs
        ]
    )


def constant_answer(task: Task) -> str:
    """Return the most common target of the training rows, of equally common ones the first: a baseline."""
    if not task.train:
        raise ValueError(
            f"{task.name} has no training rows, so it has no most common target: give it some"
        )
    # most_common keeps equal counts in the order in which they came.
    return Counter(example.target for example in task.train).most_common(1)[0][0]


def _normal(text: str) -> str:
    return text.strip().lower().replace(".", "")


def answer_options(task: Task) -> tuple[tuple[str, ...], ...] | None:
    """Return the answers that each test row could have, or None if the task's answers do not form a closed set.

    Test targets are not used. A row's options are

    * those at the end of its prompt: lines "(A) text" under "Options:" give "(A)", lines "- text" give "text". They
      count if at least half of the training targets are among their own prompts' options. In a few-shot prompt the
      last block, the row's own, counts;
    * where there are not at least two, the training targets, sorted, if they look like labels: 2 to 10 of them,
      each seen more than once. (By Good and Turing's estimate, the chance that the next row has a new label is the
      share of rows whose label was seen once.)
    """
    pairs = [(example.target, _stated(example)) for example in task.train]
    trusted = 2 * sum(target.strip() in stated for target, stated in pairs) >= len(
        pairs
    )
    counts = Counter(example.target for example in task.train)
    closed = 2 <= len(counts) <= _MOST_LABELS and min(counts.values()) > 1
    labels = tuple(sorted(counts)) if closed else ()
    stated = [_stated(example) if trusted else () for example in task.test]
    rows = tuple(
        row_options if len(row_options) >= 2 else labels for row_options in stated
    )
    return rows if all(rows) else None


def _stated(example: Example) -> tuple[str, ...]:
    """Return the options at the end of a prompt; behind them may be one line, the cue for the answer."""
    blocks = list(_BLOCK.finditer(example.input))
    if not blocks or "\n" in example.input[blocks[-1].end() :].strip():
        return ()
    options = [label or text.strip() for label, text in _OPTION.findall(blocks[-1][1])]
    return tuple(dict.fromkeys(options))
