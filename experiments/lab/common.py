"""Shared code of the experiments: the embedded small pool, runs on it, and a new folder for results."""

import contextlib
import csv
import dataclasses
import io
import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorafusion_jax import FuseOptions, Recipe, fuse
from lorafusion_jax.methods import find
from lorafusion_jax.methods import recipe_of as recipe_with
from lorafusion_jax.parts import RunFolder
from lorafusion_jax.report import write_text

from .methods import Entry
from .rows import League

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "examples" / "small"
# Of the embedded pool's shared basis: the first ones are smaller bases.
DIRECTIONS = 48
# The embedded tasks that nothing was trained or tuned on.
TASKS = ("swapends_prev", "double_digit", "odd_dash", "pairswap_numvow", "sort_next2", "last3_starvow")


@contextlib.contextmanager
def fresh_folder(folder: Path) -> Iterator[None]:
    """Make an empty folder and keep other processes out of it; an existing one is kept next to it, with a number.

    Raises:
      ValueError: another process is writing to it.
    """
    if folder.exists():
        with RunFolder(folder).locked():
            number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.{n}").exists())
            folder.rename(folder.with_name(f"{folder.name}.{number}"))
    with RunFolder(folder).locked():
        yield


def convert(base: Path, adapters: Sequence[Path], out: Path, *options: str) -> None:
    """Convert adapters as a user would, with more options of the command."""
    given = [sys.executable, ROOT / "convert_peft_weights.py", "--base", base, "--out", out]
    subprocess.run([*given, "--adapters", *adapters, *options], check=True)


def convert_small_pool(out: Path, *options: str) -> None:
    """Convert the embedded adapters."""
    convert(SMALL / "base", sorted((SMALL / "adapters").iterdir()), out, *options)


def small_pool_in_basis() -> Path:
    """Return the embedded pool with a shared basis, converted only once."""
    if not (folder := ROOT / "runs" / "small_pool_in_basis").exists():
        convert_small_pool(folder, "--basis", str(DIRECTIONS))
    return folder


def write_csv(file: Path, lines: Sequence[Sequence[Any]]) -> None:
    """Write the lines of a table, the first one its heading, into a folder that is made if it does not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(file, text.getvalue())


def with_spread(values: np.ndarray) -> str:
    """Return a mean, and the standard deviation if there are several values."""
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


# Rows that a seed uses, and passes over them. LoraHub's league gives five examples, and all methods the same.
TRAIN_ROWS: dict[League, int] = {"95+5": 100, "5": 5}
EPOCHS: dict[League, int] = {"95+5": 20, "5": 40}


def recipe_of(entry: Entry, *, league: League = "95+5", **defaults: Any) -> Recipe:
    """Return the recipe of a row of a table; it has those of the default numbers that its method has.

    Rows are padded, as they were for the committed results.

    Raises:
      TypeError: the entry has a number that its method does not have.
    """
    kind, rates = find(entry.method).recipe, (league == "5" and entry.few_rates) or entry.rates
    shared = recipe_with(kind, {"epochs": EPOCHS[league], "pack": False} | defaults)
    return dataclasses.replace(shared, **entry.recipe | rates)


def fuse_small(
    task: str,
    entry: Entry,
    *,
    pool: Path,
    seeds: tuple[int, ...],
    out: Path,
    name: str,
    league: League = "95+5",
) -> dict[str, Any]:
    """Run a method on one of the embedded tasks, all seeds in one program, and return the results."""
    options = FuseOptions(
        base=str(SMALL / "base"),
        pool=str(pool),
        task=str(SMALL / "tasks" / task),
        seeds=seeds,
        out=out,
        name=name,
        method=entry.method,
        control=entry.control,
        recipe=recipe_of(entry, league=league),
        train_rows=TRAIN_ROWS[league],
    )
    return fuse(options)
