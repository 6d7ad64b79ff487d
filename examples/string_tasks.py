"""A family of string tasks whose parts can be learned apart: a position op, then a character op.

`reverse then next : a b c` is answered by `d c b`. Letters, digits and signs stand apart by spaces, and
no two differ by case alone, so that scoring in lower case loses nothing.
"""

import zlib
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
MIN_LETTERS = 3
MAX_LETTERS = 7
MAX_OUTPUT = 2 * MAX_LETTERS

# Four that a small T5 learns at once come first, next to copy: `split` takes unseen tasks from the others.
POSITION_OPS = {
    "copy": lambda s: s,
    "rotl": lambda s: s[1:] + s[:1],
    "dropfirst": lambda s: s[1:],
    "droplast": lambda s: s[:-1],
    "first3": lambda s: s[:3],
    "reverse": lambda s: s[::-1],
    "rotr": lambda s: s[-1:] + s[:-1],
    "swapends": lambda s: s[-1:] + s[1:-1] + s[:1],
    "double": lambda s: "".join(c + c for c in s),
    "odd": lambda s: s[::2],
    "pairswap": lambda s: "".join(s[i : i + 2][::-1] for i in range(0, len(s), 2)),
    "sort": lambda s: "".join(sorted(s)),
    "last3": lambda s: s[-3:],
}

CHARACTER_OPS = {
    "same": lambda s: s,
    "next": lambda s: _shift(s, 1),
    "prev": lambda s: _shift(s, -1),
    "digit": lambda s: "".join(str((LETTERS.index(c) + 1) % 10) for c in s),
    "dash": lambda s: "-".join(s),
    "numvow": lambda s: "".join(
        str(VOWELS.index(c) + 1) if c in VOWELS else c for c in s
    ),
    "next2": lambda s: _shift(s, 2),
    "starvow": lambda s: "".join("*" if c in VOWELS else c for c in s),
    "starcon": lambda s: "".join(c if c in VOWELS else "*" for c in s),
    "mirror": lambda s: "".join(LETTERS[25 - LETTERS.index(c)] for c in s),
}


class Task(NamedTuple):
    """A position op, then a character op."""

    position: str
    character: str

    @property
    def name(self) -> str:
        return f"{self.position}_{self.character}"

    def context(self, letters: str) -> str:
        return f"{self.position} then {self.character} : {' '.join(letters)}"

    def completion(self, letters: str) -> str:
        return " ".join(
            CHARACTER_OPS[self.character](POSITION_OPS[self.position](letters))
        )


class Split(NamedTuple):
    """Who sees which tasks; no pair of ops is in two of the fields."""

    base: list[Task]
    pool: list[Task]
    tuning: list[Task]
    unseen: list[Task]
    out_of_reach: Task


def split() -> Split:
    """Return the split, by a fixed rule that gives every op its share.

    The table of 12 position ops by 8 character ops has 8 diagonals of 12 pairs. Walked diagonal by diagonal
    it gives 12 pairs to the base (in addition to all 20 single ops), 28 to the pool, 2 to tuning and 6 to unseen
    tasks. The op of the last task, `mirror`, occurs nowhere else.
    """
    positions = [op for op in POSITION_OPS if op != "copy"]
    characters = [op for op in CHARACTER_OPS if op not in ("same", "mirror")]
    singles = [Task(op, "same") for op in positions] + [
        Task("copy", op) for op in characters
    ]
    pairs = [
        Task(position, characters[(row + diagonal) % len(characters)])
        for diagonal in range(len(characters))
        for row, position in enumerate(positions)
    ]
    return Split(
        singles + pairs[:12],
        pairs[12:40],
        pairs[40:42],
        pairs[42:48],
        Task("reverse", "mirror"),
    )


def draw(
    task: Task, count: int, seed: tuple[int, ...], *, exclude: Collection[str] = ()
) -> list[dict[str, str]]:
    """Return `count` rows with keys context and completion; contexts are distinct and not in `exclude`."""
    rng = np.random.default_rng((zlib.crc32(task.name.encode()), *seed))
    seen = set(exclude)
    rows = []
    while len(rows) < count:
        length = rng.integers(MIN_LETTERS, MAX_LETTERS + 1)
        letters = "".join(LETTERS[i] for i in rng.integers(0, len(LETTERS), length))
        context = task.context(letters)
        if context not in seen:
            seen.add(context)
            rows.append({"context": context, "completion": task.completion(letters)})
    return rows


def _shift(letters: str, by: int) -> str:
    return "".join(LETTERS[(LETTERS.index(c) + by) % 26] for c in letters)
