"""Accuracy on chips against what is wrong with them, for fusion and its rivals, and against energy per task.

    python experiments/hardware_sweeps.py                                     # all sweeps
    python experiments/hardware_sweeps.py --sweeps noise --points 0 0.1       # one of them, at these points
    python experiments/hardware_sweeps.py --tasks odd_dash --chips 1 --seeds 1 --out runs/sweeps-quick

Sweeps: `noise` of programming (share of Gmax), `adc` (bits), `cell` (bits of each cell, for 7-bit weights), `age`.
Everything else is as in the configuration. Every method is trained with as many steps: digitally and then put on the
chips, or on the very chip. Written to the folder: table, rows and plot of each sweep (noise_table.csv, noise.csv,
noise.png), accuracy against energy (energy.csv and energy.png, from the sweep of noise), every row
and trained number; interrupted, the same command continues.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import _script
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from lab.common import ROOT, SMALL, write_csv
from lab.hardware import ChipsOptions, Row, Store, Subject, again, as_lines, of_tasks, slug, subject

from lorafusion_jax.crossbar import CrossbarConfig, Independent, Proportional, load_config
from lorafusion_jax.parts import CostOptions, aged, bills, markdown, shape_config
from lorafusion_jax.report import colour, plot
from lorafusion_jax.trials import ARMS

Sweep = Literal["noise", "adc", "cell", "age"]

_POINTS: dict[Sweep, tuple[str, ...]] = {
    "noise": ("0", "0.025", "0.05", "0.1", "0.2"),
    "adc": ("4", "6", "8", "10"),
    "cell": ("1", "2", "3", "6"),
    "age": ("1s", "1h", "1day", "1month", "1year"),
}
_LABELS: dict[Sweep, str] = {
    "noise": "programming error, share of Gmax",
    "adc": "bits of the ADC",
    "cell": "bits of a cell, 7-bit weights",
    "age": "age",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChipsOptions):
    """Options of the sweeps.

    Attributes:
      sweeps: one after the other.
      points: of the sweep, where it is only one; by default every sweep's own.
    """

    sweeps: tuple[Sweep, ...] = get_args(Sweep)
    points: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("swapends_prev", "pairswap_numvow")
    seeds: tuple[int, ...] = (1, 2)
    chips: int = 2
    out: Path = ROOT / "runs" / "hardware_sweeps"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the plots.

    Attributes:
      method: a row of `ARMS`.
      training: `digital` numbers are put on the chips, those of `chip` trained there.
      in_cells: a LoRA is written into cells, its task's own.
      bill: its name in the bill of a task.
    """

    method: str
    training: Literal["digital", "chip"] = "digital"
    in_cells: bool = False
    bill: str | None = None


LINES = {
    "LoRAFusion, digital": Line("LoRAFusion"),
    "LoRAFusion": Line("LoRAFusion", bill="LoRAFusion"),
    "LoRAFusion, its chip": Line("LoRAFusion", "chip", bill="LoRAFusion"),
    "coefficients only": Line("coefficients only"),
    "magnitudes only": Line("magnitudes only"),
    "LoraHub": Line("LoraHub", bill="LoraHub"),
    "LoRA in cells": Line("LoRA", in_cells=True, bill="LoRA in cells"),
    "LoRA in SRAM": Line("LoRA", bill="LoRA in SRAM"),
    "LoRA in SRAM, its chip": Line("LoRA", "chip", bill="LoRA in SRAM"),
}
_AGAIN = "LoRAFusion, trained again"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    options.check(sweeps=options.sweeps)
    if options.points and len(options.sweeps) > 1:
        raise ValueError("--points are those of one sweep: name it with --sweeps")
    base = load_config(options.crossbar)
    for sweep in options.sweeps:  # before anything is trained
        for point in options.points or _POINTS[sweep]:
            at(base, sweep, point)
    store = options.store("sweeps", "points")
    for sweep in options.sweeps:
        rows = of_tasks(options.tasks, f"{sweep}, ", lambda task, sweep=sweep: sweep_rows(store, sweep, task, options))
        write_csv(options.out / f"{sweep}_table.csv", lines := table(rows))
        print(markdown(lines))
        if sweep == "noise":
            energy = energies(rows, options)
            write_csv(options.out / "energy.csv", lines := energy_table(energy))
            print(markdown(lines))
            draw_energy(energy, options.out / "energy.png")
        write_csv(options.out / f"{sweep}.csv", as_lines(rows))
        draw(rows, sweep, options.out / f"{sweep}.png")
    print(f"written to {options.out}")


def at(base: CrossbarConfig, sweep: Sweep, point: str) -> CrossbarConfig:
    """Return the configuration at a point of a sweep.

    Raises:
      ValueError: the configuration lacks what is swept, or the point is none.
    """
    if sweep == "age":
        return aged(base, point)
    if sweep == "noise":
        model = base.device.programming
        if not isinstance(model, Independent | Proportional):
            raise ValueError("the configuration has no programming error of one sigma to sweep")
        model = dataclasses.replace(model, sigma=jnp.float32(_number(sweep, point, float)))
        return dataclasses.replace(base, device=dataclasses.replace(base.device, programming=model))
    if sweep == "adc":
        if base.adc is None:
            raise ValueError("the configuration has no ADC to sweep")
        return dataclasses.replace(base, adc=dataclasses.replace(base.adc, bits=_number(sweep, point, int)))
    bits = _number(sweep, point, int)
    if bits not in (1, 2, 3, 6):
        raise ValueError(f"cells of {bits} bits do not make up the 6 of a 7-bit weight: give 1, 2, 3 or 6")
    return dataclasses.replace(
        base,
        cell=dataclasses.replace(base.cell, bits=(bits,) * (6 // bits)),
        mapping=dataclasses.replace(base.mapping, weight_bits=7),
    )


def _number(sweep: Sweep, point: str, kind: Callable[[str], Any]) -> Any:
    with contextlib.suppress(ValueError):
        if (number := kind(point)) >= 0:
            return number
    raise ValueError(f"--points {point} is not a point of the sweep {sweep}: give such as {' '.join(_POINTS[sweep])}")


def sweep_rows(store: Store, sweep: Sweep, task: str, options: Options) -> Iterator[Row]:
    """Yield point, line, compensate (of drift, None without ages), chip, seed, exact match (percent), loss."""
    methods = dict.fromkeys(line.method for line in LINES.values())
    subjects = {method: subject(store, task, method, ARMS[method], options) for method in methods}
    new = load_config(options.crossbar)
    for point in options.points or _POINTS[sweep]:
        config = at(new, sweep, point)
        for name, line in LINES.items():
            on = subjects[line.method]
            if name == "LoRAFusion, digital":
                yield from on.rows(f"{task}-digital", None, on.params, point=point, line=name, compensate=None)
                continue
            trained_at = new if sweep == "age" else config
            where = "new" if sweep == "age" else f"{sweep}-{point}"
            params = _numbers(store, on, line, trained_at, f"{task}-{slug(name)}-{where}")
            for compensate in (False, True) if sweep == "age" else (None,):
                here = config if compensate is None else aged(config, None, compensate=compensate)
                key, of = f"{task}-{name}-{sweep}-{point}-{compensate}", {"point": point, "line": name}
                yield from on.rows(key, here, params, in_cells=line.in_cells, **of, compensate=compensate)
        if sweep == "age":
            on, config = subjects["LoRAFusion"], aged(config, None, compensate=True)
            recipe = again(on.options.recipe, options.again_epochs)
            key, name = f"{task}-again-{point}", "LoRAFusion, its chip"
            begin = _numbers(store, on, LINES[name], new, f"{task}-{slug(name)}-new")
            params = store.numbers(
                key, lambda on=on, c=config, b=begin, recipe=recipe: on.train_on_chips(c, recipe, begin=b)
            )
            yield from on.rows(key, config, params, point=point, line=_AGAIN, compensate=True)
        if sweep in ("adc", "cell"):
            jax.clear_caches()  # other bits are other programs, which take gigabytes


def _numbers(store: Store, on: Subject, line: Line, config: CrossbarConfig, name: str) -> Any:
    if line.training == "digital":
        return on.params
    return store.numbers(name, lambda: on.train_on_chips(config, on.options.recipe))


def mean(rows: Sequence[Row], line: str, point: str, compensate: bool | None = None) -> float | None:
    """Return exact match, the mean over tasks, chips and seeds, or None without any."""
    found = [
        row["exact_match"]
        for row in rows
        if row["line"] == line and row["point"] == point and row["compensate"] in (compensate, None)
    ]
    return float(np.mean(found)) if found else None


def lines_of(rows: Sequence[Row]) -> list[tuple[str, str, bool | None]]:
    """Return label, line and compensation of what is drawn: with ages, both with and without compensation."""
    found = list(dict.fromkeys((row["line"], row["compensate"]) for row in rows))
    return [(f"{line}, compensated" if compensate else line, line, compensate) for line, compensate in found]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return exact match in percent, lines by points: means over tasks, chips and seeds."""
    points = list(dict.fromkeys(row["point"] for row in rows))
    body = [
        [label, *(_said(mean(rows, line, point, compensate)) for point in points)]
        for label, line, compensate in lines_of(rows)
    ]
    return [["", *points], *body]


def draw(rows: Sequence[Row], sweep: Sweep, path: Path) -> None:
    """Draw every line against the points; dashed: without compensation of drift."""
    points = list(dict.fromkeys(row["point"] for row in rows))
    names = list(dict.fromkeys(row["line"] for row in rows))

    def on(figure: Any) -> None:
        axis = figure.subplots()
        for _, line, compensate in lines_of(rows):
            values = [mean(rows, line, point, compensate) for point in points]
            values = [np.nan if value is None else value for value in values]
            i, digital = names.index(line), line == "LoRAFusion, digital"
            axis.plot(
                range(len(points)),
                values,
                ":" if digital else "--" if compensate is False else "-",
                marker="" if digital else "os"[i // 8],
                markersize=4,
                color=colour(i),
                label=None if compensate is False else line,
            )
        axis.set_xticks(range(len(points)), [re.sub(r"^(\d+)([a-z])", r"\1 \2", point) for point in points])
        axis.set_xlabel(_LABELS[sweep] + (" (dashed: drift not compensated)" if sweep == "age" else ""))
        axis.set_ylabel("exact match, %")
        axis.set_ylim(bottom=0)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")

    plot(path, (9, 4.5), on)


def energies(rows: Sequence[Row], options: Options) -> dict[str, tuple[float, Any, Any]]:
    """Return exact match on the chips of the configuration, and joules to learn and to answer, of billed lines."""
    base = load_config(options.crossbar)
    model = base.device.programming
    assert isinstance(model, Independent | Proportional)
    point = f"{model.sigma:g}"
    asked = CostOptions(modules=20, rank=16, epochs=options.epochs, source=12, target=8)
    found = bills(shape_config(str(SMALL / "base")), base, asked)
    return {
        name: (match, found[line.bill].learning, found[line.bill].inference)
        for name, line in LINES.items()
        if line.bill is not None and (match := mean(rows, name, point)) is not None
    }


def energy_table(energy: dict[str, tuple[float, Any, Any]]) -> list[list[str]]:
    """Return the methods with accuracy and energy (low / typical / high)."""
    head = ["", "exact match, %", "J to learn the task", "J for 1,000 tokens"]
    body = [[name, f"{match:.1f}", _range(learning), _range(task)] for name, (match, learning, task) in energy.items()]
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
        for axis, label in zip(axes, ("energy to learn the task", "energy of 1,000 generated tokens"), strict=True):
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(EngFormatter("J"))
            axis.set_xlabel(label)
            axis.set_ylim(bottom=0)
        axes[0].set_ylabel("exact match on chips, %")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")

    plot(path, (11, 4.5), on)


def _range(of: Any) -> str:
    return " / ".join(f"{value:.2g}" for value in (of.low, of.typical, of.high))


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    _script.run(main)
