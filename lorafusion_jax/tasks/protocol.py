"""Draws by seed: the split into training and validation, the order of rows, the modules drawn.

Python's `random.Random` makes every draw, from a key of seed and purpose: the same on any machine.
"""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

Protocol = Literal["reference", "default"]

REFERENCE_SEED = 42


class Split(NamedTuple):
    """Row numbers, a line for each seed."""

    train: Int32[np.ndarray, "seeds train"]
    validation: Int32[np.ndarray, "seeds validation"]


def shuffled(count: int, key: int | str) -> list[int]:
    """Return 0 ... count - 1 in the order that `key` decides."""
    order = list(range(count))
    random.Random(key).shuffle(order)
    return order


def split(count: int, seeds: Sequence[int], *, protocol: Protocol = "default", limit: int = 100) -> Split:
    """Split rows into those that train and the 5 % that validate.

    The paper's code ("reference") shuffles once with seed 42, whatever the run's seed, and lets the first 5
    of 100 rows validate. The default protocol shuffles anew for every seed.

    Of fewer than 20 rows, 5 % is less than one: none is held out, all train, and the same rows validate. With
    `limit=5` that is LoraHub's league, whose 5 examples are all there is to learn from and to choose by.

    Args:
      count: how many rows there are.
      seeds: of the runs.
      protocol: whose shuffle.
      limit: use no more rows than this, the first ones after the shuffle.

    Raises:
      ValueError: if no rows are to be split.
    """
    used = min(count, limit)
    if used < 1:
        raise ValueError(f"{used} of {count} rows to split: training needs at least one")
    keys = [REFERENCE_SEED if protocol == "reference" else f"split, seed {seed}" for seed in seeds]
    order = np.array([shuffled(count, key)[:used] for key in keys], np.int32)
    held_out = used * 5 // 100
    return Split(train=order[:, held_out:], validation=order[:, : held_out or used])


def batch_orders(
    rows: Int32[np.ndarray, "seeds rows"],
    *,
    batch_size: int,
    epochs: int = 1,
    seeds: Sequence[int] | None = None,
) -> Int32[np.ndarray, "seeds steps B"]:
    """Return the row numbers of every batch; each epoch holds every row once.

    B is `batch_size`, or the number of rows if that is smaller. An epoch has ceil(rows / B) steps, the last
    one filled up with -1.

    Args:
      rows: row numbers to make batches of, a line for each seed.
      batch_size: rows in a batch.
      epochs: passes over `rows`.
      seeds: keys by which every epoch is reshuffled; None keeps the order of `rows` (the reference protocol,
        and validation).
    """
    runs, count = rows.shape
    size = min(batch_size, count)
    filling = np.full((runs, -count % size), -1, np.int32)
    pieces = []
    for epoch in range(epochs):
        order = rows
        if seeds is not None:
            keys = [f"order, epoch {epoch}, seed {seed}" for seed in seeds]
            order = np.take_along_axis(rows, np.array([shuffled(count, key) for key in keys]), axis=1)
        pieces += [order, filling]
    return np.concatenate(pieces, axis=1).reshape(runs, -1, size)


def draw_modules(names: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """Draw `count` different modules, as LoraHub and the paper's code do.

    Args:
      names: the modules of the pool, in the order that decides which ones a seed draws.
      count: how many.
      seed: of the run.

    Raises:
      ValueError: if the pool does not hold `count` modules.
    """
    if not 1 <= count <= len(names):
        raise ValueError(f"{count} modules to be drawn from a pool of {len(names)}: ask for 1 to {len(names)}")
    return tuple(names[i] for i in random.Random(seed).sample(range(len(names)), count))
