"""Pools and target tasks of the small T5, drawn at random from the pairs of string operations, and their rows."""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.io import new_folder

from .common import ROOT, SMALL

sys.path.append(str(ROOT / "examples"))

import make_small_pool as recipe
from shuffle_labels import shuffle_labels
from string_tasks import CHARACTER_OPS, MAX_LETTERS, POSITION_OPS, Task, draw, split

Relevance = Literal["both", "one", "foreign"]
Rows = list[dict[str, str]]

SEED = 20261128
# adapters of a pool, and its operations
ADAPTERS = 24
POSITIONS = 8
CHARACTERS = 5
CLASSES: tuple[Relevance, ...] = ("both", "one", "foreign")
# Targets of each class, by pool.
TARGETS = {"1": (4, 3, 3), "2": (3, 4, 3), "3": (3, 3, 4), "tuning": (2, 2, 2)}
TRAIN_ROWS = 95
VALIDATION_ROWS = 5
TEST_ROWS = 200
_TRAIN, _TEST, _POOL, _SHUFFLE = range(4)  # purposes of draws
_DOUBLE_DASH = (
    4 * MAX_LETTERS
)  # tokens of the longest answer of all pairs, twice the second longest


class Target(NamedTuple):
    """A task to fuse for, and the pool that is fused."""

    task: Task
    pool: str
    relevance: Relevance


class Design(NamedTuple):
    """Tasks of the adapters of each pool, and the targets."""

    pools: dict[str, list[Task]]
    targets: list[Target]


@functools.cache
def design() -> Design:
    """Return the draw of pools and targets; a draw with too few pairs in a class is followed by the next one."""
    rng = np.random.default_rng(SEED)
    while (found := _drawn(rng)) is None:
        pass
    return found


def _drawn(rng: np.random.Generator) -> Design | None:
    positions = [op for op in POSITION_OPS if op != "copy"]
    characters = [op for op in CHARACTER_OPS if op not in ("same", "mirror")]
    of_base = split().base
    pairs = [
        task
        for p in positions
        for c in characters
        if (task := Task(p, c)) not in of_base
    ]

    def pool() -> list[Task]:
        own = {
            positions[i] for i in rng.choice(len(positions), POSITIONS, replace=False)
        }
        own |= {
            characters[i]
            for i in rng.choice(len(characters), CHARACTERS, replace=False)
        }
        there = [task for task in pairs if own.issuperset(task)]
        chosen = (
            rng.choice(len(there), ADAPTERS, replace=False)
            if len(there) >= ADAPTERS
            else ()
        )
        return [there[i] for i in sorted(chosen)]

    pools = {name: pool() for name in TARGETS}
    taken = {task for name in pools if name != "tuning" for task in pools[name]}
    targets: list[Target] = []
    for name, counts in TARGETS.items():
        known = {op for task in pools[name] for op in task}
        for relevance, count in zip(CLASSES, counts, strict=True):
            ops = len(CLASSES) - 1 - CLASSES.index(relevance)
            free = [
                t
                for t in pairs
                if t not in taken
                and t not in pools[name]
                and len(known.intersection(t)) == ops
            ]
            if len(free) < count or not pools[name]:
                return None
            own = [
                Target(free[i], name, relevance)
                for i in sorted(rng.choice(len(free), count, replace=False))
            ]
            targets += own
            taken |= {target.task for target in own}
    return Design(pools, targets)


def test_rows(task: Task) -> Rows:
    return draw(task, TEST_ROWS, (SEED, _TEST))


def train_rows(task: Task, seed: int) -> Rows:
    """Return the rows that a seed trains on, and behind them those for validation."""
    return draw(
        task,
        TRAIN_ROWS + VALIDATION_ROWS,
        (SEED, _TRAIN, seed),
        exclude=_kept_back(task),
    )


def adapter_rows(task: Task, pool: str, *, shuffled: bool) -> Rows:
    """Return the rows that an adapter of a pool trains on; `shuffled` with the answers of one another."""
    count = recipe.POOL_STEPS * recipe.POOL_BATCH
    number = list(TARGETS).index(pool)
    rows = draw(task, count, (SEED, _POOL, number), exclude=_kept_back(task))
    return (
        shuffle_labels(rows, "completion", (SEED, _SHUFFLE, number))
        if shuffled
        else rows
    )


def _kept_back(task: Task) -> set[str]:
    """Return the contexts of a task with the letters of any target's test rows."""
    return {task.context(letters) for letters in _test_letters()}


@functools.cache
def _test_letters() -> frozenset[str]:
    rows = [row for target in design().targets for row in test_rows(target.task)]
    return frozenset(
        row["context"].partition(" : ")[2].replace(" ", "") for row in rows
    )


def write_pools(folder: Path, *, shuffled: bool) -> Iterator[Path]:
    """Train the pools that are missing in a folder, on real or on shuffled labels, and yield their folders."""
    missing = {
        pool: out
        for pool in TARGETS
        if not (out := pool_folder(folder, pool, shuffled=shuffled)).exists()
    }
    if not missing:
        return
    state = nnx.state(lf.load_base(SMALL / "base"))
    tokenizer = lf.load_tokenizer(SMALL / "base")
    for pool, out in missing.items():
        tasks = design().pools[pool]
        rows = [adapter_rows(task, pool, shuffled=shuffled) for task in tasks]
        key = jax.random.fold_in(jax.random.key(SEED), list(TARGETS).index(pool))
        longest = (
            _DOUBLE_DASH if Task("double", "dash") in tasks else recipe.TARGET_LENGTH
        )
        loras = recipe.train_loras(tokenizer, state, rows, key, longest)
        with new_folder(out) as made:
            for n, task in enumerate(tasks):
                own: Any = jax.tree.map(lambda a, n=n: np.asarray(a[:, n]), loras)
                recipe.write_lora(
                    made / task.name, own, base=SMALL / "base", as_bin=False
                )
        yield out


def pool_folder(folder: Path, pool: str, *, shuffled: bool) -> Path:
    """Return the folder of a pool; ValueError if one is there with other adapters than the design's."""
    found = folder / (f"{pool}-shuffled-labels" if shuffled else pool)
    expected = {task.name for task in design().pools[pool]}
    if (
        found.is_dir()
        and (there := {path.name for path in found.iterdir()}) != expected
    ):
        raise ValueError(
            f"{found} has other adapters than the design, such as {min(there ^ expected)}: remove it, and "
            "python experiments/pool_value.py trains the pool again"
        )
    return found
