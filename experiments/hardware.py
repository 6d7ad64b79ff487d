"""Fusion on imperfect chips: what putting it on them costs in accuracy, and what training on them wins back.

    python experiments/hardware.py                                    # 3 tasks x 3 seeds x 8 chips
    python experiments/hardware.py --tasks odd_dash --chips 2 --seeds 1 --out runs/hardware-quick
    python experiments/hardware.py --sweeps noise adc cell age --tasks swapends_prev pairswap_numvow --seeds 1 2 \\
        --chips 2 --out runs/hardware_sweeps

The pool and the base are written once onto every chip. Fusion of as many steps everywhere is trained digitally and
put there as it is (untouched), on arrays without noise (noise-blind), on another chip at every step (fresh noise), or
on the very chip (its chip). A month later the numbers are trained a little more on the chip as it is by then.

Sweeps compare fusion with its rivals instead, against the `noise` of programming (share of Gmax), the bits of the
`adc`, the bits of each `cell` (for 7-bit weights), or `age`; and, from the sweep of noise, against energy.

Written to the folder: tables, rows and plots, every row and trained number; interrupted, the same command continues.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _script
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from lab.common import ROOT, SMALL, slug, with_spread, write_csv, write_tables
from lab.hardware import (
    ChipsOptions,
    Row,
    Store,
    Subject,
    again,
    as_lines,
    matches,
    of_tasks,
    subject,
)
from lab.methods import ARMS

from lorafusion_jax.crossbar import (
    CrossbarConfig,
    Independent,
    Proportional,
    load_config,
)
from lorafusion_jax.estimates import CostOptions, shape_config, task_costs
from lorafusion_jax.hardware import aged, load_chips
from lorafusion_jax.report import colour, plot
from lorafusion_jax.runs import OnArrays

Sweep = Literal["noise", "adc", "cell", "age"]

AGE = "1month"
# How numbers are trained; the first are read digitally, all others on the chips.
TRAINED = ("digital", "untouched", "noise-blind", "fresh noise", "its chip")
# Training again: name, rows of the training set, epochs over them (None: as the options have).
BUDGETS: tuple[tuple[str, int | None, int | None], ...] = (
    ("all rows", None, None),
    ("a handful", 20, 10),
)
POINTS: dict[Sweep, tuple[Any, ...]] = {
    "noise": (0, 0.025, 0.05, 0.1, 0.2),
    "adc": (4, 6, 8, 10),
    "cell": (1, 2, 3, 6),
    "age": ("1s", "1h", "1day", "1month", "1year"),
}
_LABELS: dict[Sweep, str] = {
    "noise": "programming error, share of Gmax",
    "adc": "bits of the ADC",
    "cell": "bits of a cell, 7-bit weights",
    "age": "age (dashed: drift not compensated)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChipsOptions):
    """Options of the measurements.

    Attributes:
      sweeps: sweeps to run instead.
    """

    sweeps: tuple[Sweep, ...] = ()
    out: Path = ROOT / "runs" / "hardware"


class Line(NamedTuple):
    """A line of the plots: a row of `ARMS`, where it is trained, if a LoRA is in cells, its row of costs."""

    method: str
    training: Literal["digital", "chip"] = "digital"
    in_cells: bool = False
    title: str | None = None


LINES = {
    "LoRAFusion, digital": Line("LoRAFusion"),
    "LoRAFusion": Line("LoRAFusion", title="LoRAFusion"),
    "LoRAFusion, its chip": Line("LoRAFusion", "chip", title="LoRAFusion"),
    "coefficients only": Line("coefficients only"),
    "magnitudes only": Line("magnitudes only"),
    "LoraHub": Line("LoraHub", title="LoraHub"),
    "LoRA in cells": Line("LoRA", in_cells=True, title="LoRA in cells"),
    "LoRA in SRAM": Line("LoRA", title="LoRA in SRAM"),
    "LoRA in SRAM, its chip": Line("LoRA", "chip", title="LoRA in SRAM"),
}
_AGAIN = "LoRAFusion, trained again"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    options.check()
    config = load_chips(options.crossbar).config
    for sweep in (
        options.sweeps
    ):  # these and the age raise ValueError before anything is trained
        for point in POINTS[sweep]:
            at(config, sweep, point)
    aged(config, AGE, compensate=True)
    store = options.store("sweeps")
    for sweep in options.sweeps:
        rows = of_tasks(
            options.tasks,
            lambda task, sweep=sweep: sweep_rows(store, sweep, task, options),
        )
        found = {f"{sweep}_table": table(rows)}
        if sweep == "noise":
            energy = energies(rows, options)
            found["energy"] = energy_table(energy)
            draw_energy(energy, options.out / "energy.png")
        write_tables(options.out, found)
        write_csv(options.out / f"{sweep}.csv", as_lines(rows))
        draw_sweep(rows, sweep, options.out / f"{sweep}.png")
    if not options.sweeps:
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


def at(base: CrossbarConfig, sweep: Sweep, point: Any) -> CrossbarConfig:
    """Return the configuration at a point of a sweep; ValueError if it lacks what is swept."""
    if sweep == "age":
        return aged(base, point)
    if sweep == "noise":
        model = base.device.programming
        if not isinstance(model, Independent | Proportional):
            raise ValueError(
                "the configuration has no programming error of one sigma to sweep: give another --crossbar"
            )
        model = dataclasses.replace(model, sigma=jnp.float32(point))
        return dataclasses.replace(
            base, device=dataclasses.replace(base.device, programming=model)
        )
    if sweep == "adc":
        if base.adc is None:
            raise ValueError(
                "the configuration has no ADC to sweep: give another --crossbar"
            )
        return dataclasses.replace(base, adc=dataclasses.replace(base.adc, bits=point))
    return dataclasses.replace(
        base,
        cell=dataclasses.replace(base.cell, bits=(point,) * (6 // point)),
        mapping=dataclasses.replace(base.mapping, weight_bits=7),
    )


def sweep_rows(
    store: Store, sweep: Sweep, task: str, options: Options
) -> Iterator[Row]:
    """Yield point, line, compensate (of drift, None without ages), chip, seed, exact match (percent), loss."""
    methods = dict.fromkeys(line.method for line in LINES.values())
    subjects = {
        method: subject(store, task, method, ARMS[method], options)
        for method in methods
    }
    new = load_config(options.crossbar)
    for value in POINTS[sweep]:
        config = at(new, sweep, value)
        point = str(value)
        for name, line in LINES.items():
            on = subjects[line.method]
            if name == "LoRAFusion, digital":
                yield from on.rows(
                    f"{task}-digital",
                    None,
                    on.params,
                    point=point,
                    line=name,
                    compensate=None,
                )
                continue
            trained_at = new if sweep == "age" else config
            where = "new" if sweep == "age" else f"{sweep}-{point}"
            params = _numbers(
                store, on, line, trained_at, f"{task}-{slug(name)}-{where}"
            )
            for compensate in (False, True) if sweep == "age" else (None,):
                here = (
                    config
                    if compensate is None
                    else aged(config, None, compensate=compensate)
                )
                key = f"{task}-{name}-{sweep}-{point}-{compensate}"
                yield from on.rows(
                    key,
                    here,
                    params,
                    in_cells=line.in_cells,
                    point=point,
                    line=name,
                    compensate=compensate,
                )
        if sweep == "age":
            on = subjects["LoRAFusion"]
            config = aged(config, None, compensate=True)
            recipe = again(on.options.recipe, options.again_epochs)
            key = f"{task}-again-{point}"
            name = "LoRAFusion, its chip"
            begin = _numbers(store, on, LINES[name], new, f"{task}-{slug(name)}-new")
            params = store.numbers(
                key,
                lambda on=on, c=config, b=begin, recipe=recipe: on.train_on_chips(
                    c, recipe, begin=b
                ),
            )
            yield from on.rows(
                key, config, params, point=point, line=_AGAIN, compensate=True
            )
        if sweep in ("adc", "cell"):
            jax.clear_caches()  # other bits are other programs, which take gigabytes


def _numbers(
    store: Store, on: Subject, line: Line, config: CrossbarConfig, name: str
) -> Any:
    if line.training == "digital":
        return on.params
    return store.numbers(name, lambda: on.train_on_chips(config, on.options.recipe))


def mean(
    rows: Sequence[Row], line: str, point: str, compensate: bool | None = None
) -> float | None:
    """Return exact match, the mean over tasks, chips and seeds, or None without any."""
    found = [
        row["exact_match"]
        for row in rows
        if row["line"] == line
        and row["point"] == point
        and row["compensate"] in (compensate, None)
    ]
    return float(np.mean(found)) if found else None


def lines_of(rows: Sequence[Row]) -> list[tuple[str, str, bool | None]]:
    """Return label, line and compensation of what is drawn: with ages, both with and without compensation."""
    found = list(dict.fromkeys((row["line"], row["compensate"]) for row in rows))
    return [
        (f"{line}, compensated" if compensate else line, line, compensate)
        for line, compensate in found
    ]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return exact match in percent, lines by points: means over tasks, chips and seeds."""
    points = list(dict.fromkeys(row["point"] for row in rows))
    lines = [["", *points]]
    for label, line, compensate in lines_of(rows):
        means = [mean(rows, line, point, compensate) for point in points]
        lines.append(
            [label, *("-" if value is None else f"{value:.1f}" for value in means)]
        )
    return lines


def draw_sweep(rows: Sequence[Row], sweep: Sweep, path: Path) -> None:
    """Draw every line against the points; dashed: without compensation of drift."""
    points = list(dict.fromkeys(row["point"] for row in rows))
    names = list(dict.fromkeys(row["line"] for row in rows))

    def on(figure: Any) -> None:
        axis = figure.subplots()
        for _, line, compensate in lines_of(rows):
            values = [mean(rows, line, point, compensate) for point in points]
            values = [np.nan if value is None else value for value in values]
            i = names.index(line)
            digital = line == "LoRAFusion, digital"
            style = "--" if compensate is False else "-"
            axis.plot(
                range(len(points)),
                values,
                ":" if digital else style,
                marker="" if digital else "os"[i // 8],
                markersize=4,
                color=colour(i),
                label=None if compensate is False else line,
            )
        axis.set_xticks(
            range(len(points)),
            [re.sub(r"^(\d+)([a-z])", r"\1 \2", point) for point in points],
        )
        axis.set_xlabel(_LABELS[sweep])
        axis.set_ylabel("exact match, %")
        axis.set_ylim(bottom=0)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")

    plot(path, (9, 4.5), on)


def energies(
    rows: Sequence[Row], options: Options
) -> dict[str, tuple[float, Any, Any]]:
    """Return exact match on the chips, and joules to learn and to answer, of lines with a row of costs."""
    base = load_config(options.crossbar)
    model = base.device.programming
    assert isinstance(model, Independent | Proportional)
    point = f"{model.sigma:g}"
    asked = CostOptions(modules=20, rank=16, epochs=options.epochs, source=12, target=8)
    costs = task_costs(shape_config(str(SMALL / "base")), base, asked)
    return {
        name: (match, costs[line.title].learned, costs[line.title].token * 1000)
        for name, line in LINES.items()
        if line.title is not None and (match := mean(rows, name, point)) is not None
    }


def energy_table(energy: dict[str, tuple[float, Any, Any]]) -> list[list[str]]:
    """Return the methods with accuracy and energy (low / typical / high)."""
    head = ["", "exact match, %", "J to learn the task", "J for 1,000 tokens"]
    body = [
        [name, f"{match:.1f}", _range(learning), _range(task)]
        for name, (match, learning, task) in energy.items()
    ]
    return [head, *body]


def draw_energy(energy: dict[str, tuple[float, Any, Any]], path: Path) -> None:
    """Draw accuracy against energy, to learn a task and to use it, a point for every method, with its range."""

    def on(figure: Any) -> None:
        from matplotlib.ticker import EngFormatter

        axes = figure.subplots(1, 2, sharey=True)
        for i, (name, (match, *joules)) in enumerate(energy.items()):
            for axis, of in zip(axes, joules, strict=True):
                axis.hlines(match, of.low, of.high, color=colour(i), linewidth=1.5)
                axis.plot(of.typical, match, "o", color=colour(i), label=name)
        for axis, label in zip(
            axes,
            ("energy to learn the task", "energy of 1,000 generated tokens"),
            strict=True,
        ):
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(EngFormatter("J"))
            axis.set_xlabel(label)
            axis.set_ylim(bottom=0)
        axes[0].set_ylabel("exact match on chips, %")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")

    plot(path, (11, 4.5), on)


def _range(of: Any) -> str:
    return " / ".join(f"{value:.2g}" for value in (of.low, of.typical, of.high))


if __name__ == "__main__":
    _script.run(main)
