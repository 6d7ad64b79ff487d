"""A shared basis on imperfect chips: does a fusion in fewer cells lose more to noise than one of whole modules?

    python experiments/basis_on_chips.py                              # 3 tasks x 3 seeds x 8 chips, k = 32 and 16
    python experiments/basis_on_chips.py --sizes 32 --chips 2 --seeds 1 --out runs/basis-quick

The directions and the base are written once onto every chip; the modules in the basis stay digital. The numbers of
a task are trained digitally and put there as they are (untouched), on another chip at every step (fresh noise), or on
the very chip (its chip). A month later, with drift compensated, they are read again: as they are, after a few epochs
more on the aged chip (its chip, all rows), or with numbers that were trained on as many other chips of that age (in
advance). Written to the folder: table.csv, rows.csv, and every row and trained number; interrupted, the same command
continues.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import _script
import tyro
from hardware import AGE
from lab.common import ROOT, slug, with_spread, write_csv
from lab.hardware import (
    ChipsOptions,
    Row,
    Store,
    again,
    as_lines,
    matches,
    of_tasks,
    subject,
)
from lab.methods import ARMS, IN_BASIS

from lorafusion_jax.crossbar import save_config
from lorafusion_jax.hardware import aged, load_chips
from lorafusion_jax.report import as_markdown as markdown
from lorafusion_jax.runs import OnArrays
from lorafusion_jax.training import Params

# How numbers are trained, and the age at which they are read; None is new.
COLUMNS = (
    ("digital", None),
    *(
        (case, age)
        for case in ("untouched", "fresh noise", "its chip")
        for age in (None, AGE)
    ),
    ("its chip, all rows", AGE),
    ("in advance", AGE),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChipsOptions):
    """Options of the measurements.

    Attributes:
      sizes: numbers of directions, and whole modules.
    """

    sizes: tuple[int | Literal["whole"], ...] = ("whole", 32, 16)
    out: Path = ROOT / "runs" / "basis_on_chips"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    options.check(sizes=options.sizes)
    aged(
        load_chips(options.crossbar).config, AGE, compensate=True
    )  # raises ValueError before anything is trained
    store = options.store("sizes")
    rows = []
    for size in options.sizes:
        rows += of_tasks(
            options.tasks, lambda task, size=size: task_rows(store, task, size, options)
        )
    lines = table(rows)
    write_csv(options.out / "table.csv", lines)
    write_csv(options.out / "rows.csv", as_lines(rows))
    print(f"{markdown(lines)}\nwritten to {options.out}")


def task_rows(
    store: Store, task: str, size: int | Literal["whole"], options: Options
) -> Iterator[Row]:
    """Yield the rows of a fusion on a task: fusion, case, age, chip, seed, exact match (percent), loss."""
    # In a basis, the modules of LoRAFusion's row: a draw.
    entry = dataclasses.replace(IN_BASIS["basis"], recipe={"basis": size})
    fusion = f"k = {size}"
    if size == "whole":
        entry = ARMS["LoRAFusion"]
        fusion = "whole modules"
    on = subject(store, task, fusion, entry, options)
    new = on.chips.config
    recipe = on.options.recipe
    name = on.options.name
    month = aged(new, AGE, compensate=True)
    save_config(
        aged(new, None, compensate=True),
        compensated := store.folder / "compensated.yaml",
    )

    def on_fresh_chips(case: str, **chips: Any) -> Params:
        arrays = OnArrays(chip_key=options.chip_key, train_chip="fresh", **chips)
        return on.trained(slug(f"{name}-{case}"), arrays=arrays)

    its_chip = store.numbers(
        slug(f"{name}-its chip"), lambda: on.train_on_chips(new, recipe)
    )
    shorter = again(recipe, options.again_epochs)
    numbers = {
        "digital": on.params,
        "untouched": on.params,
        "fresh noise": on_fresh_chips("fresh noise", crossbar=options.crossbar),
        "its chip": its_chip,
        "its chip, all rows": store.numbers(
            slug(f"{name}-again"),
            lambda: on.train_on_chips(month, shorter, begin=its_chip),
        ),
        "in advance": on_fresh_chips("in advance", crossbar=str(compensated), age=AGE),
    }
    for case, age in COLUMNS:
        config = new if age is None else month
        if case == "digital":
            config = None
        of_case: Any = {"fusion": fusion, "case": case, "age": age}
        yield from on.rows(
            f"{task}-{fusion}-{case}-{age or 'new'}", config, numbers[case], **of_case
        )


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return exact match by case, of the tasks' mean ± deviation between chips, and what chips take of it.

    Drift of aged chips is compensated.
    """
    said = [case if age is None else f"{case}, {age}" for case, age in COLUMNS]
    lines = [["exact match, %", *said, *(f"lost, {name}" for name in said[1:])]]
    for fusion in dict.fromkeys(row["fusion"] for row in rows):
        found = [
            matches(rows, fusion=fusion, case=case, age=age) for case, age in COLUMNS
        ]
        lines.append(
            [
                fusion,
                *map(with_spread, found),
                *(f"{found[0].mean() - of.mean():.1f}" for of in found[1:]),
            ]
        )
    return lines


if __name__ == "__main__":
    _script.run(main)
