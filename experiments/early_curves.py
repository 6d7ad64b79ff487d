"""Do the first steps of a training forecast the advantage of a pool? Learning curves on string and language tasks.

    python experiments/early_curves.py                     # string tasks, then the table of all rows
    python experiments/early_curves.py --tasks FOLDER      # language: FOLDER holds the function-vector data sets
    python experiments/early_curves.py --tasks FOLDER --plan

The design is experiments/early_curves.md. Written to OUT: a line of curves.jsonl for each arm, task, seed and draw, and
early.csv. Interrupted, the same command continues. `python experiments/language_pool.py --tasks FOLDER --own-seeds`
trains the pool for language.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import _script
import jax
import numpy as np
import pool_value_language
import tyro
from lab import pool_cells
from lab.common import ROOT, write_tables
from lab.language import TUNING
from lab.pool_cells import FUSION, ROTATED, TARGETS, Row
from lab.smollm2 import base
from lab.string_pools import write_pools
from scipy.stats import rankdata

import lorafusion_jax as lf
from lorafusion_jax.parts import Epoch, seed_entropies
from lorafusion_jax.tasks import Batch
from lorafusion_jax.trials import Cells, print_plan, read_lines

# of training; of the test rows that early losses are on
ROWS = 20
EARLY_ROWS = 40
SHARES = {"5 %": 1, "10 %": 2, "20 %": 4}  # of the steps, and epochs of 20
ARMS = {
    "string": (FUSION, ROTATED, "LoRA, rank 16"),
    "language": (FUSION, ROTATED, "LoRA, rank 8"),
}
COST = {"string": 0.4, "language": 30.0}  # CPU seconds of a cell
SEED = 20261130
RESAMPLES = 10_000

Key = tuple[str, str, str, int, int]  # base, arm, task, seed, draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      tasks: measure language, with the function-vector data sets of this folder.
      pools: folder of the string tasks' pools; missing ones are trained.
      pool: folder of the adapters of SmolLM2.
      out: folder of results; cells that are there are not measured again.
      plan: print what is missing and its time, and measure nothing.
    """

    tasks: Path | None = None
    pools: Path = ROOT / "runs" / "pool_value" / "pools"
    pool: Path = ROOT / "runs" / "language_own" / "adapters"
    out: Path = ROOT / "results" / "trial"
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


class Curve:
    """Losses of one training: after each epoch of its rows, early on some test rows, and at its end on the others."""

    def __init__(self):
        self.train = []
        self.validation = []
        self.early = {}
        self.final = np.empty(0)

    def __call__(self, epoch: Epoch, problem: lf.Problem, test: Batch) -> None:
        def loss(params: Any, rows: slice) -> np.ndarray:
            return np.asarray(
                seed_entropies(
                    params, jax.tree.map(lambda leaf: leaf[:, rows], test), problem
                )
            )

        self.train.append(epoch.metrics["cross_entropy"].mean(axis=0))
        self.validation.append(epoch.validation_loss)
        if epoch.number in SHARES.values():
            self.early[epoch.number] = loss(epoch.state.params, slice(EARLY_ROWS))
        if epoch.last:
            self.final = loss(epoch.state.best, slice(EARLY_ROWS, None))

    def row(self, seed: int) -> Row:
        """Return the losses of a seed, by its place."""
        train = [round(float(of[seed]), 4) for of in self.train]
        validation = [round(float(of[seed]), 4) for of in self.validation]
        early = {
            str(number): round(float(of[seed]), 5) for number, of in self.early.items()
        }
        return {
            "train": train,
            "validation": validation,
            "early": early,
            "final": round(float(self.final[seed]), 5),
        }


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, or print its cost."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    cells = of_curves(options.out)
    measure = strings if options.tasks is None else language
    kind = "string"
    paths = {}
    if options.tasks is not None:
        kind, (paths, _) = (
            "language",
            pool_value_language.draw(options.tasks, ROOT / "runs/pool_value/language"),
        )
    wanted = keys(kind, [name for name in paths if name not in TUNING])
    if options.plan:
        print_plan(
            ((f"{kind}, {key[1]}", COST[kind]) for key in cells.missing(wanted)),
            ", without the pools",
        )
        return
    cells.fill(
        wanted,
        lambda missing: measure(missing, options, paths),
        lambda row: f"{key_of(row)}: {row['final']}",
    )
    write_tables(options.out, {"early": table(cells.rows())})


def keys(kind: str, names: Sequence[str]) -> list[Key]:
    """Return the keys of all cells of string tasks, or of the named language tasks."""
    if kind == "language":
        return [
            (kind, arm, task, s, 0)
            for s in pool_value_language.SEEDS
            for task in names
            for arm in ARMS[kind]
        ]
    return [
        (kind, arm, *key[2:])
        for arm in ARMS[kind]
        for key in pool_cells.cells(arm, ROWS)
    ]


def key_of(row: Row) -> Key:
    return row["base"], row["arm"], row["task"], row["seed"], row["draw"]


def of_curves(out: Path) -> Cells[Key]:
    """Return the cells of the measurement."""
    return Cells(out / "curves.jsonl", key_of)


def strings(
    missing: Sequence[Key], options: Options, _: Mapping[str, Path]
) -> Iterator[Row]:
    """Yield rows of string tasks, with the rates that were tuned for the value of a pool."""
    for folder in write_pools(options.pools, shuffled=False):
        print(f"trained {folder}")
    lab = pool_cells.Lab(options.pools)
    rates = tuned("rows_20")
    for (kind, arm, task, draw), group in itertools.groupby(
        missing, key=lambda key: (*key[:3], key[4])
    ):
        began = time.process_time()
        seeds = [key[3] for key in group]
        curve = Curve()
        entries = [(seed, rates[arm]) for seed in seeds]
        lab.measure(
            arm, TARGETS[task], ROWS, entries, draw=draw, answer=False, watch=curve
        )
        seconds = round((time.process_time() - began) / len(seeds), 2)
        for place, seed in enumerate(seeds):
            of_key = {
                "base": kind,
                "arm": arm,
                "task": task,
                "seed": seed,
                "draw": draw,
                "rates": rates[arm],
            }
            yield of_key | curve.row(place) | {"cpu_seconds": seconds}


def language(
    missing: Sequence[Key], options: Options, paths: Mapping[str, Path]
) -> Iterator[Row]:
    """Yield rows of language tasks, with the rates that were tuned for the value of a pool."""
    lab = pool_value_language.Lab(base(), options.pool)
    rates = tuned("language")
    for kind, arm, task, seed, draw in missing:
        began = time.process_time()
        curve = Curve()
        lab.measure(arm, paths[task], ROWS, seed, rates[arm], answer=False, watch=curve)
        of_key = {
            "base": kind,
            "arm": arm,
            "task": task,
            "seed": seed,
            "draw": draw,
            "rates": rates[arm],
        }
        yield (
            of_key
            | curve.row(0)
            | {"cpu_seconds": round(time.process_time() - began, 1)}
        )


def tuned(name: str) -> dict[str, dict[str, float]]:
    """Return the rates of the arms of committed rows with 20 training rows."""
    rows = read_lines(ROOT / "results" / "pool_value" / f"{name}.jsonl")
    return {row["arm"]: row["rates"] for row in rows if row["rows"] == ROWS}


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the rank correlations of early and final advantages, of contrasts whose rows all exist."""
    by_cell: dict[tuple[str, str, str], list[list[float]]] = {}
    for row in rows:
        training = [fmean(row["train"][:epoch]) for epoch in SHARES.values()]
        by_cell.setdefault(key_of(row)[:3], []).append(
            [*row["early"].values(), *training, row["final"]]
        )
    means = {cell: np.mean(losses, axis=0) for cell, losses in by_cell.items()}
    have = {*map(key_of, rows)}
    lines = [
        [
            "tasks",
            "control",
            "loss",
            "share of the steps",
            "rank correlation",
            "its 95 % interval",
            "same sign",
        ]
    ]
    for kind, (fusion, *controls) in ARMS.items():
        names = [*dict.fromkeys(row["task"] for row in rows if row["base"] == kind)]
        for control in controls if names else ():
            if not have.issuperset(
                key for key in keys(kind, names) if key[1] in (fusion, control)
            ):
                continue
            gains = np.array(
                [
                    means[kind, control, task] - means[kind, fusion, task]
                    for task in names
                ]
            )
            for label, early in zip(
                itertools.product(("test rows", "training"), SHARES),
                gains.T,
                strict=False,
            ):
                rank, low, high = rank_correlation(early, gains[:, -1])
                same = np.mean(np.sign(early) == np.sign(gains[:, -1]))
                shown = (f"{rank:.2f}", f"{low:.2f} to {high:.2f}", f"{same:.0%}")
                lines.append([f"{len(names)} {kind}", control, *label, *shown])
    return lines


def rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return Spearman's rank correlation with its 95 % interval, by a bootstrap over tasks."""
    drawn = np.random.default_rng(SEED).integers(len(x), size=(RESAMPLES, len(x)))
    both = (
        rankdata(values[np.vstack([np.arange(len(x)), drawn])], axis=1)
        for values in (x, y)
    )
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in both)
    with np.errstate(invalid="ignore"):
        found = np.sum(a * b, axis=1) / np.sqrt(
            np.sum(a * a, axis=1) * np.sum(b * b, axis=1)
        )
    low, high = np.nanquantile(found[1:], (0.025, 0.975))
    return float(found[0]), float(low), float(high)


if __name__ == "__main__":
    _script.run(main)
