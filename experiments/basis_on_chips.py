"""A shared basis on imperfect chips: does a fusion in fewer cells lose more to noise than one of whole modules?

    python experiments/basis_on_chips.py                              # 3 tasks x 3 seeds x 8 chips, k = 32 and 16
    python experiments/basis_on_chips.py --cases digital untouched    # nothing is trained on chips

The directions and the base are written once onto every chip; the modules in the basis stay digital. The numbers of
a task are trained digitally and put there as they are (untouched), on another chip at every step (fresh noise), or on
the very chip (its chip). A month later, with drift compensated, they are read again: as they are, after a few epochs
more on the aged chip (its chip, all rows), or with numbers that were trained on as many other chips of that age
(prepared). Earlier rows on the same chips are not computed again: `experiments/hardware.py` has whole modules, with the
same tasks, seeds and modules. Written to the folder: table.csv, rows.csv, and every row and trained number that was
computed here; interrupted, the same command continues.
"""

import csv
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import _script
import tyro
from lab.common import ROOT, with_spread, write_csv
from lab.hardware import ChipsOptions, Row, Store, Subject, again, as_lines, matches, of_tasks, slug, subject
from lab.methods import IN_BASIS

from lorafusion_jax.crossbar import CrossbarConfig
from lorafusion_jax.parts import Params, aged, load_chips, markdown
from lorafusion_jax.trials import ARMS, Arm

Case = Literal["digital", "untouched", "fresh noise", "its chip", "its chip, all rows", "prepared"]
_WHOLE = "whole modules"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChipsOptions):
    """Options of the measurements.

    Attributes:
      sizes: numbers of directions, and whole modules.
      cases: how numbers are trained and where they are read.
      age: at which the chips are read again.
      earlier: rows on the same chips, of whole modules where they do not name a fusion.
    """

    sizes: tuple[int | Literal["whole"], ...] = ("whole", 32, 16)
    cases: tuple[Case, ...] = get_args(Case)
    age: str = "1month"
    earlier: tuple[Path, ...] = (ROOT / "results" / "hardware" / "rows.csv",)
    out: Path = ROOT / "runs" / "basis_on_chips"


_DEFAULTS = vars(Options())


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    options.check(sizes=options.sizes, cases=options.cases)
    _check_earlier(options)
    config = load_chips(options.crossbar).config
    for age in {age for case in options.cases for age in ages(case, options)} - {None}:
        aged(config, age, compensate=True)  # raises ValueError before anything is trained
    store = options.store("sizes", "cases", "earlier")
    there, rows = earlier_rows(options), []
    for size in options.sizes:
        # In a basis, the modules of LoRAFusion's row: a draw.
        whole = size == "whole"
        entry = ARMS["LoRAFusion"] if whole else dataclasses.replace(IN_BASIS["basis"], recipe={"basis": size})
        fusion = _WHOLE if whole else f"k = {size}"

        def of_fusion(task: str, fusion: str = fusion, entry: Arm = entry) -> Iterator[Row]:
            known = {row["case"] for row in there if (row["task"], row["fusion"]) == (task, fusion)}
            cases: list[Case] = [case for case in options.cases if case not in known]
            for row in task_rows(store, task, fusion, entry, cases, options):
                yield {"fusion": fusion, **row}

        rows += of_tasks(options.tasks, f"{fusion}, ", of_fusion)
    lines = table([*there, *rows], options)
    write_csv(options.out / "table.csv", lines)
    write_csv(options.out / "rows.csv", as_lines([*there, *rows]))
    print(f"{markdown(lines)}\nwritten to {options.out}")


def task_rows(
    store: Store, task: str, fusion: str, entry: Arm, cases: Sequence[Case], options: Options
) -> Iterator[Row]:
    """Yield the rows of a fusion's cases on a task: case, age, chip, seed, exact match (percent), loss."""
    if not cases:
        return
    on = subject(store, task, fusion, entry, options)
    config = on.chips.config
    for case in cases:
        name = slug(f"{task}-{fusion}-{case}")
        if case == "digital":
            yield from on.rows(name, None, on.params, case=case, age=None)
            continue
        for age in ages(case, options):
            here = config if age is None else aged(config, age, compensate=True)
            yield from on.rows(f"{name}-{age or 'new'}", here, _numbers(on, case, here, options), case=case, age=age)


def ages(case: Case, options: Options) -> tuple[str | None, ...]:
    """Return the ages at which a case's chips are read; None is new."""
    if case == "digital":
        return (None,)
    return (options.age,) if case in ("its chip, all rows", "prepared") else (None, options.age)


def _numbers(on: Subject, case: Case, here: CrossbarConfig, options: Options) -> Params:
    """Return the numbers of a case, trained only once; `here` is the configuration that they are read with."""
    new, recipe, name = on.chips.config, on.options.recipe, on.options.name

    def of(case: Case, train: Callable[[], Params]) -> Params:
        return on.store.numbers(slug(f"{name}-{case}"), train)

    def on_its_chip() -> Params:
        return of("its chip", lambda: on.train_on_chips(new, recipe))

    match case:
        case "fresh noise":
            return of(case, lambda: on.train_on_fresh_chips(new, recipe))
        case "prepared":
            return of(case, lambda: on.train_on_fresh_chips(here, recipe))
        case "its chip":
            return on_its_chip()
        case "its chip, all rows":
            shorter = again(recipe, options.again_epochs)
            return of(case, lambda: on.train_on_chips(here, shorter, begin=on_its_chip()))
    return on.params


def earlier_rows(options: Options) -> list[Row]:
    """Return the rows of earlier results that are like those computed here, each once; drift is compensated."""
    found: dict[tuple[str, ...], Row] = {}
    for path in options.earlier:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                fusion = row.get("fusion", _WHOLE)
                chip, seed = int(row["chip"]), int(row["seed"])
                asked = row["case"] in options.cases and row["task"] in options.tasks
                if asked and row.get("compensate") != "False" and chip < options.chips and seed in options.seeds:
                    key = (row["task"], fusion, row["case"], row["age"], row["chip"], row["seed"])
                    names = {"task": row["task"], "fusion": fusion, "case": row["case"], "age": row["age"] or None}
                    scores = {name: float(row[name]) for name in ("exact_match", "loss")}
                    found.setdefault(key, {**names, "chip": chip, "seed": seed, **scores})
    rows = list(found.values())
    # A case that lacks a chip, a seed or an age is computed anew, so that all means are over the same ones.
    have = {(row["task"], row["fusion"], row["case"], row["age"], row["chip"], row["seed"]) for row in rows}

    def whole(task: str, fusion: str, case: Case) -> bool:
        chips = range(1 if case == "digital" else options.chips)
        places = itertools.product(ages(case, options), chips, options.seeds)
        return all((task, fusion, case, *place) in have for place in places)

    return [row for row in rows if whole(row["task"], row["fusion"], row["case"])]


def _check_earlier(options: Options) -> None:
    """Raise ValueError where the rows that are kept with the results are of other settings than those asked for."""
    names = ("crossbar", "chip_key", "epochs", "again_epochs", "test_rows")
    other = [f"--{n.replace('_', '-')} {getattr(options, n)}" for n in names if getattr(options, n) != _DEFAULTS[n]]
    if other and options.earlier == _DEFAULTS["earlier"]:
        files = ", ".join(map(str, options.earlier))
        raise ValueError(
            f"{files} has rows of the default settings, not of {', '.join(other)}: give rows of these with --earlier, "
            "or --earlier without a file, and all are computed here"
        )


def table(rows: Sequence[Row], options: Options) -> list[list[str]]:
    """Return exact match by case, of the tasks' mean ± deviation between chips, and what chips take of it.

    Drift of aged chips is compensated.
    """
    columns = [(case, age) for case in options.cases for age in ages(case, options)]
    said = [case if age is None else f"{case}, {age}" for case, age in columns]
    lines = [["exact match, %", *said, *(f"lost, {name}" for name in said[1:])]]
    for fusion in dict.fromkeys(row["fusion"] for row in rows):
        found = [matches(rows, fusion=fusion, case=case, age=age) for case, age in columns]
        lost = [f"{found[0].mean() - of.mean():.1f}" if len(of) else "" for of in found[1:]]
        lines.append([fusion, *(with_spread(of) if len(of) else "" for of in found), *lost])
    return lines


if __name__ == "__main__":
    _script.run(main)
