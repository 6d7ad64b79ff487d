"""A shared basis on imperfect chips: does a fusion in fewer cells lose more to noise than one of whole modules?

    python experiments/basis_on_chips.py                              # 3 tasks x 3 seeds x 8 chips, k = 16 and 32
    python experiments/basis_on_chips.py --cases digital untouched    # nothing is trained on chips

The directions and the base are written once onto every chip; the modules in the basis stay digital. The numbers of
a task are trained digitally and put there as they are (untouched), or trained on the very chip (its chip). A month
later, with drift compensated, both are read again. Whole modules are the rows of `experiments/hardware.py`, which has
the same tasks, seeds, modules and chips. Written to the folder: table.md, rows.csv, every row and trained number;
interrupted, the same command goes on.
"""

import csv
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import jax
import numpy as np
import tyro
from _common import ROOT
from _hardware import Row, Store, csv_of, slug, subject
from _methods import IN_BASIS

from lorafusion_jax import cli
from lorafusion_jax.columns import markdown
from lorafusion_jax.crossbar import config_hash
from lorafusion_jax.hardware.folder import aged, load_chips
from lorafusion_jax.report import write_text

Case = Literal["digital", "untouched", "its chip"]
_WHOLE = "whole modules"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurements.

    Attributes:
      sizes: numbers of directions.
      cases: how numbers are trained and where they are read.
      tasks: of the embedded ones.
      seeds: each draws modules, starts and orders of rows.
      chips: how many.
      crossbar: configuration of the arrays; it needs a drift model.
      chip_key: key from which chips are drawn.
      age: at which the chips are read again.
      epochs: of training.
      test_rows: evaluate on the first rows only.
      whole: rows of whole modules on the same chips.
      out: folder of results; what is there already is not computed again.
    """

    sizes: tuple[int, ...] = (32, 16)
    cases: tuple[Case, ...] = get_args(Case)
    tasks: tuple[str, ...] = ("swapends_prev", "pairswap_numvow", "sort_next2")
    seeds: tuple[int, ...] = (1, 2, 3)
    chips: int = 8
    crossbar: str = str(ROOT / "examples" / "chip.yaml")
    chip_key: int = 0
    age: str = "1month"
    epochs: int = 20
    test_rows: int | None = None
    whole: Path = ROOT / "docs" / "results" / "hardware" / "rows.csv"
    out: Path = ROOT / "runs" / "basis_on_chips"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    store = Store(options.out)
    settings = dataclasses.asdict(options) | {
        "config": config_hash(load_chips(options.crossbar).config),
        "key": options.chip_key,
    }
    apart = ("out", "sizes", "cases", "tasks", "crossbar", "chip_key", "whole")
    store.claim({name: value for name, value in settings.items() if name not in apart})
    rows = list(whole_rows(options))
    for task in options.tasks:
        for k in options.sizes:
            began = time.perf_counter()
            rows += [{"task": task, "fusion": f"k = {k}", **row} for row in task_rows(store, task, k, options)]
            jax.clear_caches()  # other shapes are other programs, which take gigabytes
            print(f"{task}, k = {k}: {(time.perf_counter() - began) / 60:.1f} min", file=sys.stderr, flush=True)
    text = table(rows, options)
    write_text(options.out / "table.md", text)
    write_text(options.out / "rows.csv", csv_of([row for row in rows if row["fusion"] != _WHOLE]))
    print(f"{text}\nwritten to {options.out}")


def task_rows(store: Store, task: str, k: int, options: Options) -> Iterator[Row]:
    """Yield the rows of a task in k directions: case, age, chip, seed, exact match (percent), loss."""
    chips = load_chips(options.crossbar, key=options.chip_key)
    # The modules of LoRAFusion's row: a draw.
    entry = dataclasses.replace(IN_BASIS["basis"], recipe={"basis": k})
    on = subject(
        store,
        task,
        f"k = {k}",
        entry,
        seeds=options.seeds,
        epochs=options.epochs,
        chips=chips,
        count=options.chips,
        test_rows=options.test_rows,
    )
    config = chips.config
    for case in options.cases:
        name = slug(f"{task}-{k}-{case}")
        if case == "digital":
            found = store.rows(name, lambda: on.score_digitally(on.params))
            yield from ({"case": case, "age": None, **row} for row in found)
            continue
        params = on.params
        if case == "its chip":
            params = store.numbers(name, lambda: on.train_on_chips(config, on.options.recipe))
        for age in (None, options.age):
            here = config if age is None else aged(config, age, compensate=True)
            found = store.rows(f"{name}-{age or 'new'}", lambda here=here, params=params: on.score(here, params))
            yield from ({"case": case, "age": age, **row} for row in found)


def whole_rows(options: Options) -> Iterator[Row]:
    """Yield the rows of whole modules that are like those in a basis; drift is compensated."""
    with options.whole.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["case"] not in options.cases or row["compensate"] == "False" or row["task"] not in options.tasks:
                continue
            numbers = {"chip": int(row["chip"]), "seed": int(row["seed"]), "exact_match": float(row["exact_match"])}
            if numbers["chip"] < options.chips and numbers["seed"] in options.seeds:
                yield {"task": row["task"], "fusion": _WHOLE, "case": row["case"], "age": row["age"] or None, **numbers}


def table(rows: Sequence[Row], options: Options) -> str:
    """Return exact match by case, of the tasks' mean, and what chips take of it."""
    columns = [(case, age) for case in options.cases for age in ((None,) if case == "digital" else (None, options.age))]
    said = [case if age is None else f"{case}, {age}" for case, age in columns]
    lines = [["exact match, %", *said, *(f"lost, {name}" for name in said[1:])]]
    for fusion in dict.fromkeys(row["fusion"] for row in rows):
        found = [matches(rows, fusion, case, age) for case, age in columns]
        lost = [f"{found[0].mean() - of.mean():.1f}" for of in found[1:]]
        lines.append([fusion, *map(_said, found), *lost])
    return (
        f"{len(options.tasks)} tasks, {len(options.seeds)} seeds, {options.chips} chips, {options.epochs} epochs; mean "
        f"± standard deviation between chips; aged chips with drift compensated.\n\n{markdown(lines)}"
    )


def matches(rows: Sequence[Row], fusion: str, case: str, age: str | None) -> np.ndarray:
    """Return exact match of chips [C], means over tasks and seeds; digital ones have one."""
    found = [row for row in rows if (row["fusion"], row["case"], row["age"]) == (fusion, case, age)]
    chips = sorted({row["chip"] for row in found})
    return np.array([np.mean([row["exact_match"] for row in found if row["chip"] == chip]) for chip in chips])


def _said(of_chips: np.ndarray) -> str:
    return f"{of_chips.mean():.1f}" + (f" ± {of_chips.std(ddof=1):.1f}" if len(of_chips) > 1 else "")


if __name__ == "__main__":
    cli.run(main)
