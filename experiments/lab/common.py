"""Shared code of the experiments: the embedded small pool, runs on it, and a new folder for results."""

import contextlib
import csv
import io
import itertools
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lorafusion_jax import FuseOptions
from lorafusion_jax.methods import find
from lorafusion_jax.report import as_markdown as markdown, over_tasks, write_text
from lorafusion_jax.runs import RunFolder
from lorafusion_jax.trials import Shots

from .matrix import TRAIN_ROWS, Arm, recipe_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "examples" / "small"
# Of the embedded pool's shared basis: the first ones are smaller bases.
DIRECTIONS = 48
# The embedded tasks that nothing was trained or tuned on.
TASKS = (
    "swapends_prev",
    "double_digit",
    "odd_dash",
    "pairswap_numvow",
    "sort_next2",
    "last3_starvow",
)


@contextlib.contextmanager
def fresh_folder(folder: Path) -> Iterator[None]:
    """Make an empty folder and keep other processes out of it; an existing one is kept next to it, with a number.

    Raises:
      ValueError: another process is writing to it.
    """
    if folder.exists():
        with RunFolder(folder).locked():
            number = next(
                n
                for n in itertools.count(1)
                if not folder.with_name(f"{folder.name}.{n}").exists()
            )
            folder.rename(folder.with_name(f"{folder.name}.{number}"))
    with RunFolder(folder).locked():
        yield


def convert(base: Path, adapters: Sequence[Path], out: Path, *options: str) -> None:
    """Convert adapters as a user would, with more options of the command."""
    given = [
        sys.executable,
        ROOT / "convert_peft_weights.py",
        "--base",
        base,
        "--out",
        out,
    ]
    subprocess.run([*given, "--adapters", *adapters, *options], check=True)


def convert_small_pool(out: Path, *options: str) -> None:
    """Convert the embedded adapters."""
    convert(SMALL / "base", sorted((SMALL / "adapters").iterdir()), out, *options)


def small_pool_in_basis() -> Path:
    """Return the embedded pool with a shared basis, converted only once."""
    if not (folder := ROOT / "runs" / "small_pool_in_basis").exists():
        convert_small_pool(folder, "--basis", str(DIRECTIONS))
    return folder


def slug(name: str) -> str:
    """Return a name for files."""
    return name.replace(",", "").replace(" ", "_")


def write_csv(file: Path, lines: Sequence[Sequence[Any]]) -> None:
    """Write the lines of a table, the first one its heading, into a folder that is made if it does not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(file, text.getvalue())


def write_tables(
    folder: Path, tables: Mapping[str, Sequence[Sequence[str]]], prefix: str = ""
) -> None:
    """Write tables by name as CSV, with a prefix of their names, and print them."""
    for name, lines in tables.items():
        write_csv(folder / f"{prefix}{name}.csv", lines)
        print(f"{name}\n{markdown(lines)}")


def with_interval(values: Sequence[float], digits: int) -> list[str]:
    """Return a mean, and its 95 % interval if there are several values."""
    ends = over_tasks(values)
    mean = fmean(values) if ends is None else ends.mean
    return [
        f"{mean:.{digits}f}",
        "-" if ends is None else f"{ends.low:.{digits}f} to {ends.high:.{digits}f}",
    ]


def with_spread(values: np.ndarray) -> str:
    """Return a mean, and the standard deviation if there are several values."""
    return f"{values.mean():.1f}" + (
        f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    )


def options_of_small(
    task: str,
    arm: Arm,
    *,
    seeds: tuple[int, ...],
    pool: Path | None = None,
    shots: Shots = "95+5",
    **run: Any,
) -> FuseOptions:
    """Return the options of an arm on an embedded task, all seeds in one program.

    Args:
      task: its name.
      arm: the method and its settings.
      seeds: seeds.
      pool: a converted pool; the embedded adapters by default.
      shots: rows to learn from.
      run: other options, such as `out` and `name`.
    """
    shared: dict[str, Any] = {"recipe": recipe_of(arm, shots=shots)}
    return FuseOptions(
        base=str(SMALL / "base"),
        pool=str(pool or SMALL / "adapters") if find(arm.method).pool else None,
        task=str(SMALL / "tasks" / task),
        seeds=seeds,
        method=arm.method,
        control=arm.control,
        train_rows=TRAIN_ROWS[shots],
        **shared | run,
    )


def print_plan(costs: Iterable[tuple[str, float]], note: str = "") -> None:
    """Print the number of missing results and their CPU time by label, and the time of all.

    Args:
      costs: label and CPU seconds of each result.
      note: printed after the total.
    """
    by_label: dict[str, list[float]] = {}
    for label, seconds in costs:
        by_label.setdefault(label, []).append(seconds)
    for label, seconds in by_label.items():
        print(f"{label}: {len(seconds)} results, {sum(seconds) / 60:.1f} minutes")
    count = sum(map(len, by_label.values()))
    total = sum(map(sum, by_label.values()))
    print(f"{count} results, {total / 60:.0f} CPU minutes{note}")
