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


def split(
    count: int,
    seeds: Sequence[int],
    *,
    protocol: Protocol = "default",
    limit: int = 100,
) -> Split:
    """Split the first `limit` of `count` shuffled rows into 95 % for training and 5 % for validation.

    The paper's code ("reference") shuffles once with seed 42, whatever the run's seed, and takes the first 5 of 100
    rows for validation. The default protocol shuffles anew for every seed. Fewer than 20 rows are all used for both:
    with `limit=5` those are LoraHub's five shots.
    """
    used = min(count, limit)
    if used < 1:
        raise ValueError(
            f"{used} of {count} rows to split: give at least one to train on"
        )
    keys = [
        REFERENCE_SEED if protocol == "reference" else f"split, seed {seed}"
        for seed in seeds
    ]
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

    B is `batch_size`, or the number of rows if that is smaller. An epoch has ceil(rows / B) steps, the last one filled
    up with -1. Every epoch is reshuffled by the seeds; None keeps the order of `rows` (the reference protocol, and
    validation). Seeds with fewer rows than others, which -1 fills up, begin each epoch with steps without rows.
    """
    size = min(batch_size, rows.shape[1])
    steps = -(-rows.shape[1] // size)
    orders = np.full((len(rows), epochs, steps * size), -1, np.int32)
    for run, filled in enumerate(rows):
        of_run = filled[filled >= 0]
        count = len(of_run)
        begin = (steps - -(-count // size)) * size
        for epoch in range(epochs):
            order = of_run
            if seeds is not None:
                key = f"order, epoch {epoch}, seed {seeds[run]}"
                order = of_run[shuffled(count, key)]
            orders[run, epoch, begin : begin + count] = order
    return orders.reshape(len(rows), -1, size)


def draw_modules(names: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """Draw `count` different modules of a pool, as LoraHub and the paper's code do; the order of `names` matters."""
    if not 1 <= count <= len(names):
        raise ValueError(
            f"{count} modules to be drawn from a pool of {len(names)}: draw 1 to {len(names)}"
        )
    return tuple(names[i] for i in random.Random(seed).sample(range(len(names)), count))
