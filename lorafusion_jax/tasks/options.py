"""The answers that a test row could have, to be scored instead of generated."""

import re
from collections import Counter

from .data import Example, Task

_MOST_LABELS = 10
# "Options:" and, on separate lines, "(A) text" or "- text".
_BLOCK = re.compile(
    r"^options:[ \t]*((?:\n(?:\([A-Z]\)|-) .*)+)", re.IGNORECASE | re.MULTILINE
)
_OPTION = re.compile(r"^(?:(\([A-Z]\))|- (.*))", re.MULTILINE)


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
