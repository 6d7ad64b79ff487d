"""States of a run: a folder of `arrays` for each of the last steps, of which the newest sound one is loaded."""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..support import processes
from ..support.reading import T
from ..support.writing import writing
from . import arrays
from .folders import newest_sound

_STEP = re.compile(r"step_(\d+)")


def load_newest(
    folders: Sequence[Path], abstract: Any, *, metadata: type[T] | Any = dict[str, Any], note: Callable[[str], None]
) -> tuple[Any, T] | None:
    """Return the tree of the last sound folder, as NumPy arrays, and its metadata (see `folders.newest_sound`).

    `abstract` is a tree with the structure, shapes and dtypes that the result must have, or a FileError is raised.
    """
    sound = newest_sound(folders, metadata, "a complete checkpoint", note=note)
    return sound and (arrays.read_like(sound[0], abstract), sound[2])


def save_step(checkpoints: Path, step: int, tree: Any, metadata: Mapping[str, Any], *, keep: int) -> None:
    """Save `checkpoints / step_000123`, as `arrays.save` does, then remove all but the latest `keep` (>= 1)."""
    arrays.save(checkpoints / f"step_{step:06d}", tree, metadata)
    if processes.first():
        with writing(checkpoints):
            for old in steps(checkpoints)[:-keep]:
                shutil.rmtree(old)


def steps(checkpoints: Path) -> list[Path]:
    """Return the folders of the saved steps, oldest first."""
    steps = {int(match[1]): path for path in checkpoints.glob("*") if (match := _STEP.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]
