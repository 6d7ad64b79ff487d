"""Arrays of one matrix that devices share out at boundaries of tiles, so that no column's sum leaves its device.

By columns, every device has some of the outputs. By rows it has some of the inputs, and the codes of all conversions
are summed over devices: integers, whose sum is exact in any order.
"""

import jax
from jax.sharding import PartitionSpec

from .chip import Chip
from .plan import Cut, Split

# Axis of row tiles, and of columns or column tiles, counted from the end; 0 for none.
_AXES = {
    **dict.fromkeys(("codes", "scale", "columns.low"), (2, 1)),
    **dict.fromkeys(
        ("columns", "columns.words", "columns.variances", "variance"), (3, 1)
    ),
    **dict.fromkeys(("flipped", "gain", "offset"), (3, 2)),
    **{"cells": (4, 3), "occupied": (1, 0), "inputs": (2, 0), "outputs": (0, 1)},
}


def partition(split: Split | None, name: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Return the partition of an array of a chip, by its name, or of the tiled inputs or the outputs of its read."""
    place = 0 if split is None else _AXES.get(name, (0, 0))[split.by == "columns"]
    if split is None or not place or shape[-place] == 1:
        return PartitionSpec(*[None] * len(shape))
    return PartitionSpec(
        *[None] * (len(shape) - place), split.axis, *[None] * (place - 1)
    )


def partitions(chip: Chip) -> list[PartitionSpec]:
    """Return the partition of every leaf of a chip."""
    names = [
        (jax.tree_util.keystr(path, simple=True, separator="."), a)
        for path, a in jax.tree.leaves_with_path(chip)
    ]
    # The variances of one product have no tiles.
    unsplit = () if chip.columns is not None else ("variance",)
    return [
        partition(chip.plan.split, "" if name in unsplit else name, a.shape)
        for name, a in names
    ]


def unfit(chip: Chip, by: Cut, parts: int) -> str | None:
    """Return the reason why so many devices cannot share out the arrays of a chip, or None."""
    tiles = chip.geometry.rows if by == "rows" else chip.geometry.cols
    if parts == 1:
        return None
    if len(tiles) % parts or len(set(tiles)) > 1:
        return f"{len(tiles)} tile{'s' * (len(tiles) > 1)} of {' or '.join(map(str, dict.fromkeys(tiles)))} {by}"
    if (
        by == "columns"
        and chip.config.encoding.unit_column
        and chip.columns is not None
    ):
        return "unit columns, which are next to those of all tiles"
    if by == "rows" and (
        chip.scale.shape[-2] > 1
        or (chip.limits is not None and chip.limits.shape[-3] > 1)
    ):
        return "a range for every row tile, whose outputs are no integers"
    return None
