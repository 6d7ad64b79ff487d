"""A shared basis on imperfect chips: does a fusion in fewer cells lose more to noise than one of whole modules?

    python experiments/basis_on_chips.py                              # 3 tasks x 3 seeds x 8 chips, k = 32 and 16
    python experiments/basis_on_chips.py --cases digital untouched    # nothing is trained on chips

The directions and the base are written once onto every chip; the modules in the basis stay digital. The numbers of
a task are trained digitally and put there as they are (untouched), on another chip at every step (fresh noise), or on
the very chip (its chip). A month later, with drift compensated, they are read again: as they are, after a few epochs
more on the aged chip (its chip, all rows), or with numbers that were trained on as many other chips of that age
(prepared). Written to the folder: table.csv, rows.csv, and every row and trained number; interrupted, the same command
continues.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import _script
import tyro
from hardware import AGE
from lab.common import ROOT, slug, with_spread, write_csv
from lab.hardware import ChipsOptions, Row, Store, Subject, again, as_lines, matches, of_tasks, subject
from lab.methods import IN_BASIS

from lorafusion_jax.crossbar import CrossbarConfig, save_config
from lorafusion_jax.parts import OnArrays, Params, aged, load_chips, markdown
from lorafusion_jax.trials import ARMS, Arm

Case = Literal["digital", "untouched", "fresh noise", "its chip", "its chip, all rows", "prepared"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChipsOptions):
    """Options of the measurements.

    Attributes:
      sizes: numbers of directions, and whole modules.
      cases: how numbers are trained and where they are read.
    """

    sizes: tuple[int | Literal["whole"], ...] = ("whole", 32, 16)
    cases: tuple[Case, ...] = get_args(Case)
    out: Path = ROOT / "runs" / "basis_on_chips"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    options.check(sizes=options.sizes, cases=options.cases)
    aged(load_chips(options.crossbar).config, AGE, compensate=True)  # raises ValueError before anything is trained
    store, rows = options.store("sizes", "cases"), []
    for size in options.sizes:
        # In a basis, the modules of LoRAFusion's row: a draw.
        whole = size == "whole"
        entry = ARMS["LoRAFusion"] if whole else dataclasses.replace(IN_BASIS["basis"], recipe={"basis": size})
        fusion = "whole modules" if whole else f"k = {size}"
        of_fusion = partial(task_rows, store, fusion=fusion, entry=entry, options=options)
        rows += of_tasks(options.tasks, f"{fusion}, ", of_fusion)
    lines = table(rows, options.cases)
    write_csv(options.out / "table.csv", lines)
    write_csv(options.out / "rows.csv", as_lines(rows))
    print(f"{markdown(lines)}\nwritten to {options.out}")


def task_rows(store: Store, task: str, fusion: str, entry: Arm, options: Options) -> Iterator[Row]:
    """Yield the rows of a fusion on a task: fusion, case, age, chip, seed, exact match (percent), loss."""
    on = subject(store, task, fusion, entry, options)
    config = on.chips.config
    for case in options.cases:
        name = slug(f"{task}-{fusion}-{case}")
        if case == "digital":
            yield from on.rows(name, None, on.params, fusion=fusion, case=case, age=None)
            continue
        for age in ages(case):
            here = config if age is None else aged(config, age, compensate=True)
            numbers = _numbers(on, case, here, options)
            yield from on.rows(f"{name}-{age or 'new'}", here, numbers, fusion=fusion, case=case, age=age)


def ages(case: Case) -> tuple[str | None, ...]:
    """Return the ages at which a case's chips are read; None is new."""
    if case == "digital":
        return (None,)
    return (AGE,) if case in ("its chip, all rows", "prepared") else (None, AGE)


def _numbers(on: Subject, case: Case, here: CrossbarConfig, options: Options) -> Params:
    """Return the numbers of a case, trained only once; `here` is the configuration that they are read with."""
    new, recipe, name = on.chips.config, on.options.recipe, on.options.name

    def of(case: Case, train: Callable[[], Params]) -> Params:
        return on.store.numbers(slug(f"{name}-{case}"), train)

    def on_its_chip() -> Params:
        return of("its chip", lambda: on.train_on_chips(new, recipe))

    def on_fresh_chips(crossbar: str, age: str | None) -> Params:
        arrays = OnArrays(crossbar=crossbar, chip_key=options.chip_key, train_chip="fresh", age=age)
        return on.trained(slug(f"{name}-{case}"), arrays=arrays)

    match case:
        case "fresh noise":
            return on_fresh_chips(options.crossbar, None)
        case "prepared":
            save_config(aged(new, None, compensate=True), file := on.store.folder / "compensated.yaml")
            return on_fresh_chips(str(file), AGE)
        case "its chip":
            return on_its_chip()
        case "its chip, all rows":
            shorter = again(recipe, options.again_epochs)
            return of(case, lambda: on.train_on_chips(here, shorter, begin=on_its_chip()))
    return on.params


def table(rows: Sequence[Row], cases: Sequence[Case]) -> list[list[str]]:
    """Return exact match by case, of the tasks' mean ± deviation between chips, and what chips take of it.

    Drift of aged chips is compensated.
    """
    columns = [(case, age) for case in cases for age in ages(case)]
    said = [case if age is None else f"{case}, {age}" for case, age in columns]
    lines = [["exact match, %", *said, *(f"lost, {name}" for name in said[1:])]]
    for fusion in dict.fromkeys(row["fusion"] for row in rows):
        found = [matches(rows, fusion=fusion, case=case, age=age) for case, age in columns]
        lines.append([fusion, *map(with_spread, found), *(f"{found[0].mean() - of.mean():.1f}" for of in found[1:])])
    return lines


if __name__ == "__main__":
    _script.run(main)
