"""Scores of predictions: exact match and the constant answer."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from .data import Task


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
