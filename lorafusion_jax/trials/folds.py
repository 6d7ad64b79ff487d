"""Parts of a task's rows; rows with the same input are never divided between two parts."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int

TUNING_PARTS = 3  # rates are tuned on two parts and compared on the third one
FEWEST_ROWS = 2  # of a part: one row has no spread


def divide(
    groups: Sequence[Hashable], parts: int, key: Sequence[int]
) -> Int[np.ndarray, " rows"]:
    """Return the part of each row, from 0. Parts have about the same number of rows.

    Args:
      groups: input of each row.
      parts: number of parts.
      key: integers that the random order of the inputs depends on.

    Raises:
      ValueError: there are too few inputs or rows.
    """
    if parts < 2:
        raise ValueError(
            f"rows cannot be divided into {parts} parts: give at least 2 folds"
        )
    sizes = Counter(groups)
    fewer = f", or lower --folds (it is {parts})" if parts > TUNING_PARTS else ""
    if len(sizes) < parts:
        folds = (
            "all have the same input"
            if len(sizes) == 1
            else f"have {len(sizes)} different inputs"
        )
        raise ValueError(
            f"the {len(groups)} rows {folds}, expected at least {parts}, because rows with one input stay together: "
            f"add rows with other inputs{fewer}"
        )
    inputs = list(sizes)
    order = np.random.default_rng([*key, parts]).permutation(len(inputs))
    rows_in = [0] * parts
    part_of = dict[Hashable, int]()
    for group in sorted(
        (inputs[place] for place in order), key=lambda group: -sizes[group]
    ):
        part_of[group] = rows_in.index(min(rows_in))
        rows_in[part_of[group]] += sizes[group]
    if min(rows_in) < FEWEST_ROWS:
        raise ValueError(
            f"{len(groups)} rows give a fold of {min(rows_in)}, expected at least {FEWEST_ROWS} in each of {parts}: "
            f"add rows{fewer}"
        )
    return np.array([part_of[group] for group in groups])
