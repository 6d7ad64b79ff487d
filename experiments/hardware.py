"""Fusion on imperfect chips: what putting it on them costs in accuracy, and what training on them wins back.

    python experiments/hardware.py                                    # 3 tasks x 3 seeds x 8 chips
    python experiments/hardware.py --tasks odd_dash --chips 2 --seeds 1 --out runs/hardware-quick
    python experiments/hardware.py --crossbar mine.yaml --out runs/hardware-mine

The pool and the base are written once onto every chip. Fusion of as many steps everywhere is trained digitally and
put there as it is (untouched), on arrays without noise (noise-blind), on another chip at every step (fresh noise), or
on the very chip (its chip). A month later the numbers are trained a little more on the chip as it is by then. Written
to the folder: new.csv and aged.csv (tables of new and aged chips), rows.csv, hardware.png, every row and trained
number; interrupted, the same command continues.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _script
import numpy as np
import tyro
from lab.common import ROOT, with_spread, write_csv, write_tables
from lab.hardware import ChipsOptions, Row, Store, again, as_lines, matches, of_tasks, slug, subject

from lorafusion_jax.parts import OnArrays, aged, load_chips
from lorafusion_jax.report import colour, plot
from lorafusion_jax.trials import ARMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChipsOptions):
    """Options of the measurements.

    Attributes:
      age: at which numbers are trained again.
      few_rows: of training again on a handful of rows.
      few_epochs: over them.
    """

    age: str = "1month"
    few_rows: int = 20
    few_epochs: int = 10
    out: Path = ROOT / "runs" / "hardware"


# How numbers are trained; the first are read digitally, all others on the chips.
TRAINED = ("digital", "untouched", "noise-blind", "fresh noise", "its chip")
# Of training again.
BUDGETS = ("all rows", "a handful")


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    options.check()
    aged(load_chips(options.crossbar).config, options.age, compensate=True)  # raises ValueError before any training
    store = options.store()
    rows = of_tasks(options.tasks, "", lambda task: task_rows(store, task, options))
    write_tables(options.out, tables(rows, options))
    write_csv(options.out / "rows.csv", as_lines(rows))
    draw(rows, options, options.out / "hardware.png")
    print(f"written to {options.out}")


def task_rows(store: Store, task: str, options: Options) -> Iterator[Row]:
    """Yield the rows of a task: case, age, whether drift is compensated, chip, seed, exact match (percent), loss."""
    on = subject(store, task, "LoRAFusion", ARMS["LoRAFusion"], options)
    new, recipe = on.chips.config, on.options.recipe

    def scored(
        case: str, params: Any, age: str | None = None, *, compensate: bool | None = None, digital: bool = False
    ) -> Iterator[Row]:
        config = None if digital else new if age is None else aged(new, age, compensate=compensate)
        name = f"{task}-{case}" + ("" if digital else f"-{age or 'new'}-{compensate}")
        return on.rows(name, config, params, case=case, age=age, compensate=compensate)

    yield from scored("digital", on.params, digital=True)
    arrays = OnArrays(crossbar=options.crossbar, chip_key=options.chip_key)
    numbers = {
        "untouched": on.params,
        "noise-blind": on.trained(
            f"{task}-blind", arrays=dataclasses.replace(arrays, train_chip="none"), recipe=recipe
        ),
        "fresh noise": on.trained(
            f"{task}-fresh", arrays=dataclasses.replace(arrays, train_chip="fresh"), recipe=recipe
        ),
        "its chip": store.numbers(f"{task}-chip", lambda: on.train_on_chips(new, recipe)),
    }
    for case, params in numbers.items():
        yield from scored(case, params)
        for compensate in (False, True):
            yield from scored(case, params, options.age, compensate=compensate)
    # Trained again a month later, compared with as many more steps without any noise.
    month = aged(new, options.age, compensate=True)
    budgets = ((None, options.again_epochs), (options.few_rows, options.few_epochs))
    for name, (count, epochs) in zip(BUDGETS, budgets, strict=True):
        shorter = again(recipe, epochs)
        more = {"recipe": shorter, "train_rows": count or on.options.train_rows}
        run = on.options.out / (on.options.name or "")
        clean = on.trained(slug(f"{task}-digital-{name}"), start_from=run, **more)
        yield from scored(f"digital, {name}", clean, digital=True)
        yield from scored(f"untouched, {name}", clean, options.age, compensate=True)
        blind = on.trained(
            slug(f"{task}-blind-{name}"),
            start_from=on.options.out / f"{task}-blind",
            arrays=dataclasses.replace(arrays, train_chip="none"),
            **more,
        )
        yield from scored(f"noise-blind, {name}", blind, options.age, compensate=True)
        here = store.numbers(
            slug(f"{task}-again-{name}"),
            lambda r=shorter, count=count: on.train_on_chips(month, r, begin=numbers["its chip"], rows=count),
        )
        yield from scored(f"its chip, {name}", here, options.age, compensate=True)


def tables(rows: Sequence[Row], options: Options) -> dict[str, list[list[str]]]:
    """Return the tables by name: new chips, and chips of the age; mean ± standard deviation between chips."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))

    def spread(case: str, age: str | None = None, compensate: bool | None = None) -> list[str]:
        found = [matches(rows, task=task, case=case, age=age, compensate=compensate) for task in tasks]
        mean = np.mean([of_task.mean() for of_task in found])
        return [*map(with_spread, found), f"{mean:.1f}"]

    def back(trained: str, untouched: str, digital: str, age: str | None, compensate: bool | None) -> list[str]:
        shares = [won_back(rows, [task], trained, untouched, digital, age, compensate) for task in tasks]
        shares.append(won_back(rows, tasks, trained, untouched, digital, age, compensate))
        return ["-" if share is None else f"{share:.0f}" for share in shares]

    head = [*tasks, "mean"]
    new = [["exact match, %", *head]] + [[f"{case}", *spread(case)] for case in TRAINED]
    new += [[f"won back by {case}, %", *back(case, "untouched", "digital", None, None)] for case in TRAINED[2:]]
    month = [["exact match, %", *head]]
    for case in TRAINED[1:]:
        for compensate, note in ((False, ""), (True, ", drift compensated")):
            month.append([f"{case}{note}", *spread(case, options.age, compensate)])
    for budget in BUDGETS:
        month.append([f"digital, {budget} again", *spread(f"digital, {budget}")])
        for case in ("untouched", "noise-blind", "its chip"):
            month.append([f"{case}, {budget} again on it", *spread(f"{case}, {budget}", options.age, compensate=True)])
        for case in ("noise-blind", "its chip"):
            names = (f"{case}, {budget}", f"untouched, {budget}", f"digital, {budget}")
            month.append([f"won back by {case}, %", *back(*names, options.age, True)])
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

    here, without, could = mean(trained, age, compensate), mean(untouched, age, compensate), mean(digital, None, None)
    return None if could == without else 100 * (here - without) / (could - without)


def draw(rows: Sequence[Row], options: Options, path: Path) -> None:
    """Accuracy by case and task, a dot for each chip: new chips, and those of the age."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    aged_cases = [(case, True) for case in TRAINED[1:]] + [
        (f"{case}, {budget}", True) for budget in BUDGETS for case in ("untouched", "its chip")
    ]
    panels: list[tuple[str, list[tuple[str, str | None, bool | None]]]] = [
        ("new chips", [(case, None, None) for case in TRAINED]),
        (f"{options.age}, drift compensated", [(case, options.age, compensate) for case, compensate in aged_cases]),
    ]

    def on(figure: Any) -> None:
        axes = figure.subplots(1, 2, sharey=True, width_ratios=[len(cases) for _, cases in panels])
        for axis, (title, cases) in zip(axes, panels, strict=True):
            for t, task in enumerate(tasks):
                for i, case in enumerate(cases):
                    found = matches(rows, task=task, **dict(zip(("case", "age", "compensate"), case, strict=True)))
                    place = i + 0.2 * (t - (len(tasks) - 1) / 2)
                    axis.plot([place] * len(found), found, ".", color=colour(t + 1), alpha=0.6)
                    label = task if i == 0 else None
                    axis.plot(place, found.mean(), "_", color=colour(t + 1), markersize=14, label=label)
            axis.set_title(title)
            axis.set_xticks(range(len(cases)), [case for case, *_ in cases], rotation=25, ha="right")
        axes[0].set_ylabel("exact match, %")
        axes[0].set_ylim(bottom=0)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(tasks))

    plot(path, (11, 4.5), on)


if __name__ == "__main__":
    _script.run(main)
