"""Fusion on imperfect chips: what putting it on them costs in accuracy, and what training on them wins back.

    python experiments/hardware.py                                    # 3 tasks x 3 seeds x 8 chips
    python experiments/hardware.py --tasks odd_dash --chips 2 --seeds 1 --out runs/hardware-quick

The pool and the base are written once onto every chip. Fusion of as many steps everywhere is trained digitally and
put there as it is (untouched), on arrays without noise (noise-blind), on another chip at every step (fresh noise), or
on the very chip (its chip). A month later the numbers are trained a little more on the chip as it is by then.

Written to the folder: tables, rows and plots, every row and trained number; interrupted, the same command continues.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _script
import numpy as np
import tyro
from lab.common import ROOT, slug, with_spread, write_csv, write_tables
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
from lab.methods import ARMS

from lorafusion_jax.hardware import aged, load_chips
from lorafusion_jax.report import colour, plot
from lorafusion_jax.runs import OnArrays

AGE = "1month"
# How numbers are trained; the first are read digitally, all others on the chips.
TRAINED = ("digital", "untouched", "noise-blind", "fresh noise", "its chip")
# Training again: name, rows of the training set, epochs over them (None: as the options have).
BUDGETS: tuple[tuple[str, int | None, int | None], ...] = (
    ("all rows", None, None),
    ("a handful", 20, 10),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChipsOptions):
    """Options of the measurements."""

    out: Path = ROOT / "runs" / "hardware"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    options.check()
    # The age raises ValueError before anything is trained.
    aged(load_chips(options.crossbar).config, AGE, compensate=True)
    store = options.store()
    rows = of_tasks(options.tasks, lambda task: task_rows(store, task, options))
    write_tables(options.out, tables(rows))
    write_csv(options.out / "rows.csv", as_lines(rows))
    draw(rows, options.out / "hardware.png")
    print(f"written to {options.out}")


def task_rows(store: Store, task: str, options: Options) -> Iterator[Row]:
    """Yield the rows of a task: case, age, whether drift is compensated, chip, seed, exact match (percent), loss."""
    on = subject(store, task, "LoRAFusion", ARMS["LoRAFusion"], options)
    new = on.chips.config
    recipe = on.options.recipe

    def scored(
        case: str,
        params: Any,
        age: str | None = None,
        *,
        compensate: bool | None = None,
        digital: bool = False,
    ) -> Iterator[Row]:
        config = new if age is None else aged(new, age, compensate=compensate)
        if digital:
            config = None
        name = f"{task}-{case}" + ("" if digital else f"-{age or 'new'}-{compensate}")
        return on.rows(name, config, params, case=case, age=age, compensate=compensate)

    yield from scored("digital", on.params, digital=True)
    arrays = OnArrays(crossbar=options.crossbar, chip_key=options.chip_key)
    numbers = {
        "untouched": on.params,
        "noise-blind": on.trained(
            f"{task}-blind",
            arrays=dataclasses.replace(arrays, train_chip="none"),
            recipe=recipe,
        ),
        "fresh noise": on.trained(
            f"{task}-fresh",
            arrays=dataclasses.replace(arrays, train_chip="fresh"),
            recipe=recipe,
        ),
        "its chip": store.numbers(
            f"{task}-chip", lambda: on.train_on_chips(new, recipe)
        ),
    }
    for case, params in numbers.items():
        yield from scored(case, params)
        for compensate in (False, True):
            yield from scored(case, params, AGE, compensate=compensate)
    # Trained again a month later, compared with as many more steps without any noise.
    month = aged(new, AGE, compensate=True)
    for name, count, epochs in BUDGETS:
        shorter = again(recipe, epochs or options.again_epochs)
        train_rows = count or on.options.train_rows
        run = on.options.out / (on.options.name or "")
        clean = on.trained(
            slug(f"{task}-digital-{name}"),
            start_from=run,
            recipe=shorter,
            train_rows=train_rows,
        )
        yield from scored(f"digital, {name}", clean, digital=True)
        yield from scored(f"untouched, {name}", clean, AGE, compensate=True)
        blind = on.trained(
            slug(f"{task}-blind-{name}"),
            start_from=on.options.out / f"{task}-blind",
            arrays=dataclasses.replace(arrays, train_chip="none"),
            recipe=shorter,
            train_rows=train_rows,
        )
        yield from scored(f"noise-blind, {name}", blind, AGE, compensate=True)
        here = store.numbers(
            slug(f"{task}-again-{name}"),
            lambda r=shorter, count=count: on.train_on_chips(
                month, r, begin=numbers["its chip"], rows=count
            ),
        )
        yield from scored(f"its chip, {name}", here, AGE, compensate=True)


def tables(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Return the tables by name: new chips, and chips of the age; mean ± standard deviation between chips."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))

    def spread(
        case: str, age: str | None = None, compensate: bool | None = None
    ) -> list[str]:
        found = [
            matches(rows, task=task, case=case, age=age, compensate=compensate)
            for task in tasks
        ]
        mean = np.mean([of_task.mean() for of_task in found])
        return [*map(with_spread, found), f"{mean:.1f}"]

    def back(
        trained: str,
        untouched: str,
        digital: str,
        age: str | None,
        compensate: bool | None,
    ) -> list[str]:
        shares = [
            won_back(rows, [task], trained, untouched, digital, age, compensate)
            for task in tasks
        ]
        shares.append(
            won_back(rows, tasks, trained, untouched, digital, age, compensate)
        )
        return ["-" if share is None else f"{share:.0f}" for share in shares]

    head = [*tasks, "mean"]
    new = [["exact match, %", *head]] + [[f"{case}", *spread(case)] for case in TRAINED]
    new += [
        [f"won back by {case}, %", *back(case, "untouched", "digital", None, None)]
        for case in TRAINED[2:]
    ]
    month = [["exact match, %", *head]]
    for case in TRAINED[1:]:
        for compensate, note in ((False, ""), (True, ", drift compensated")):
            month.append([f"{case}{note}", *spread(case, AGE, compensate)])
    for budget, *_ in BUDGETS:
        month.append([f"digital, {budget} again", *spread(f"digital, {budget}")])
        for case in ("untouched", "noise-blind", "its chip"):
            month.append(
                [
                    f"{case}, {budget} again on it",
                    *spread(f"{case}, {budget}", AGE, compensate=True),
                ]
            )
        for case in ("noise-blind", "its chip"):
            names = (f"{case}, {budget}", f"untouched, {budget}", f"digital, {budget}")
            month.append([f"won back by {case}, %", *back(*names, AGE, True)])
    return {"new": new, "aged": month}


def won_back(
    rows: Sequence[Row],
    tasks: Sequence[str],
    trained: str,
    untouched: str,
    digital: str,
    age: str | None,
    compensate: bool | None,
) -> float | None:
    """Return the share of the loss, digital to untouched, that training wins back, in percent; None without a loss."""

    def mean(case: str, age: str | None, compensate: bool | None) -> float:
        of: Any = {"case": case, "age": age, "compensate": compensate}
        return float(np.mean([matches(rows, task=task, **of).mean() for task in tasks]))

    here = mean(trained, age, compensate)
    without = mean(untouched, age, compensate)
    could = mean(digital, None, None)
    return None if could == without else 100 * (here - without) / (could - without)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy by case and task, a dot for each chip: new chips, and those of the age."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    aged_cases = [(case, True) for case in TRAINED[1:]] + [
        (f"{case}, {budget}", True)
        for budget, *_ in BUDGETS
        for case in ("untouched", "its chip")
    ]
    panels: list[tuple[str, list[tuple[str, str | None, bool | None]]]] = [
        ("new chips", [(case, None, None) for case in TRAINED]),
        (
            f"{AGE}, drift compensated",
            [(case, AGE, compensate) for case, compensate in aged_cases],
        ),
    ]

    def on(figure: Any) -> None:
        axes = figure.subplots(
            1, 2, sharey=True, width_ratios=[len(cases) for _, cases in panels]
        )
        for axis, (title, cases) in zip(axes, panels, strict=True):
            for t, task in enumerate(tasks):
                for i, case in enumerate(cases):
                    found = matches(
                        rows,
                        task=task,
                        **dict(zip(("case", "age", "compensate"), case, strict=True)),
                    )
                    place = i + 0.2 * (t - (len(tasks) - 1) / 2)
                    axis.plot(
                        [place] * len(found), found, ".", color=colour(t + 1), alpha=0.6
                    )
                    label = task if i == 0 else None
                    axis.plot(
                        place,
                        found.mean(),
                        "_",
                        color=colour(t + 1),
                        markersize=14,
                        label=label,
                    )
            axis.set_title(title)
            axis.set_xticks(
                range(len(cases)), [case for case, *_ in cases], rotation=25, ha="right"
            )
        axes[0].set_ylabel("exact match, %")
        axes[0].set_ylim(bottom=0)
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            loc="outside upper right",
            ncols=len(tasks),
        )

    plot(path, (11, 4.5), on)


if __name__ == "__main__":
    _script.run(main)
