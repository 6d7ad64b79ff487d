"""Cost of a new task on arrays: every method's bill for several base models and kinds of array.

    python experiments/cost.py          # FLAN-T5-small, base, large and SmolLM2-135M on isaac, puma, neurram
    python experiments/cost.py --shapes t5-base --crossbars raella

Written to the folder: table.csv (one line for each quantity of a method, in joules, seconds and counts), and a plot for
each shape. No weights are loaded; seconds.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _script
import tyro
from lab.common import write_csv

from lorafusion_jax.crossbar import Range, WriteCost, load_config
from lorafusion_jax.parts import (
    Bill,
    Comparison,
    CostOptions,
    Once,
    activities,
    comparisons,
    installed_once,
    known_shapes,
    price,
    price_once,
)
from lorafusion_jax.report import colour, plot

_PARTS = {"putting it in place": "install", "its update": "update", "the base's passes": "base"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the bills.

    Attributes:
      shapes: of base models, by name.
      crossbars: of arrays: names or files.
      out: folder to write to.
    """

    shapes: tuple[str, ...] = ("flan-t5-small", "flan-t5-base", "flan-t5-large", "smollm2-135m")
    crossbars: tuple[str, ...] = ("isaac", "puma", "neurram")
    out: Path = Path("runs/cost")


@dataclasses.dataclass(frozen=True)
class Billed:
    """One shape on one kind of array."""

    options: CostOptions
    bills: dict[str, Bill]
    against: dict[str, Comparison]
    once: dict[str, Once]


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    if unknown := [shape for shape in options.shapes if shape not in known_shapes()]:
        raise ValueError(f"no shapes {', '.join(unknown)}: choose of {', '.join(known_shapes())}")
    found = []
    for shape in options.shapes:
        for name in options.crossbars:
            asked = CostOptions(shape=shape, crossbar=name)
            config, crossbar = known_shapes()[shape], load_config(name)
            of = {activity.method: activity for activity in activities(config, crossbar, asked)}
            written = installed_once(config, crossbar, asked)
            found.append(
                Billed(
                    asked,
                    {name: price(activity, crossbar, asked) for name, activity in of.items()},
                    comparisons(of, crossbar, asked),
                    {name: price_once(standing) for name, standing in written.items()},
                )
            )
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "table.csv", table(found))
    for shape in options.shapes:
        draw([b for b in found if b.options.shape == shape], options.out / f"{shape}.png")
    print(f"written to {options.out}")


def table(found: Sequence[Billed]) -> list[list[str]]:
    """Every quantity of every bill: shape, preset, method, quantity, unit, low, typical, high."""
    lines = [["shape", "preset", "method", "quantity", "unit", "low", "typical", "high"]]
    for billed in found:
        of = [billed.options.shape, billed.options.crossbar]
        lines += [[*of, name, what, unit, *_ends(value, unit)] for name, what, unit, value in _lines(billed)]
    return lines


def _lines(billed: Billed) -> Iterator[tuple[str, str, str, Range]]:
    for name, bill in billed.bills.items():
        for found in _quantities(bill):
            yield name, *found
    for name, c in billed.against.items():
        for what, value in c._asdict().items():
            unit = {"extra_per_token": "J", "break_even": "tokens"}.get(what, "1")
            yield f"LoRA in cells : {name}", what, unit, value
    for name, standing in billed.once.items():
        for found in _of_standing(standing):
            yield f"once: {name}", *found


def _ends(value: Range, unit: str) -> list[str]:
    """Six digits; counts are whole."""
    return [f"{end:.{12 if unit == '1' and end == int(end) else 6}g}" for end in (value.low, value.typical, value.high)]


def draw(found: Sequence[Billed], path: Path) -> None:
    """Energy until a task is learned, by part, and of a generated token with its source: a column for each preset."""

    def on(figure: Any) -> None:
        from matplotlib.ticker import EngFormatter

        axes = figure.subplots(2, len(found), sharex="row", sharey=True, squeeze=False)
        for column, billed in enumerate(found):
            bills = list(billed.bills.values())
            for row, of_token in enumerate((False, True)):
                axis = axes[row][column]
                for i, bill in enumerate(bills):
                    for k, (label, value) in enumerate(_drawn(bill, billed.options, of_token=of_token)):
                        place = i + (0 if of_token else 0.22 * (k - 1))
                        axis.hlines(place, value.low, value.high, color=colour(k + 3), linewidth=1.5)
                        legend = label if i == 0 and not of_token else None
                        axis.plot(value.typical, place, "o", color=colour(k + 3), markersize=4, label=legend)
                axis.set_xscale("log")
                axis.xaxis.set_major_formatter(EngFormatter("J"))
                axis.set_yticks(range(len(bills)), [bill.method for bill in bills])
                axis.grid(visible=True, axis="x")
                axis.set_xlabel("energy of a token with its source" if of_token else "energy to learn a task")
            axes[0][column].set_title(billed.options.crossbar)
        axes[0][0].invert_yaxis()
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
        figure.suptitle(f"{found[0].options.shape}: typical energy, with low and high ends", x=0.01, ha="left", size=12)

    plot(path, (4.2 * len(found), 7.5), on)


def _drawn(bill: Bill, options: CostOptions, *, of_token: bool) -> Iterator[tuple[str, Range]]:
    if of_token:
        yield "", bill.inference / options.tokens_per_task
    else:
        for label, part in _PARTS.items():
            yield label, getattr(bill, part)


def _quantities(bill: Bill) -> Iterator[tuple[str, str, Range]]:
    yield "trained parameters", "1", Range.of(bill.trainable)
    yield from _of_writing(bill.written)
    yield "cycles of a cell", "1", bill.written.cycles
    if bill.written.until_worn is not None:
        yield "tasks until wear-out", "1", bill.written.until_worn
    for label, part in _PARTS.items():
        yield label, "J", getattr(bill, part)
    yield "learned", "J", bill.learning
    for token in ("source", "generated"):
        energy = getattr(bill, token)
        for component, value in energy._asdict().items():
            yield f"one {token} token, {component}", "J", value
        yield f"one {token} token", "J", energy.total
    yield "latency of a generated token, arrays", "s", bill.latency_arrays
    yield "latency of a generated token, digital", "s", bill.latency_digital
    yield "adapters' arrays", "1", Range.of(bill.adapter_arrays)


def _of_standing(standing: Once) -> Iterator[tuple[str, str, Range]]:
    yield "arrays", "1", Range.of(standing.arrays)
    yield from _of_writing(standing.written)
    yield "words of tables", "1", Range.of(standing.words)
    yield "energy of tables", "J", standing.tables


def _of_writing(written: WriteCost) -> Iterator[tuple[str, str, Range]]:
    yield "cells written", "1", Range.of(written.cells)
    yield "write-verify pulses", "1", written.pulses
    yield "writing, energy", "J", written.energy
    yield "writing, time", "s", written.time


if __name__ == "__main__":
    _script.run(main)
