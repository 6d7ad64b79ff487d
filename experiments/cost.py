"""Cost of a new task on arrays: every method's bill for several base models and kinds of array.

    python experiments/cost.py          # FLAN-T5-small, base, large and SmolLM2-135M on isaac, puma, neurram
    python experiments/cost.py --shapes t5-base --crossbars raella

Written to the folder: table.csv (one line for each quantity of a method, in joules, seconds and counts), and a plot for
each shape. No weights are loaded; seconds.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import _script
import tyro
from lab.common import write_csv

from lorafusion_jax.crossbar import Range, ReadEnergy, load_config
from lorafusion_jax.estimates import (
    Bill,
    CostOptions,
    activities,
    comparisons,
    installed_once,
    price,
    price_once,
)
from lorafusion_jax.models import known_shapes
from lorafusion_jax.report import colour, plot

_PARTS = {
    "putting it in place": "install",
    "its update": "update",
    "the base's passes": "base",
}
# Quantity -> unit and attribute.
_WRITING = {
    "cells written": ("1", "written.cells"),
    "write-verify pulses": ("1", "written.pulses"),
    "writing, energy": ("J", "written.energy"),
    "writing, time": ("s", "written.time"),
}
_OF_BILL = {
    "trained parameters": ("1", "trainable"),
    **_WRITING,
    "cycles of a cell": ("1", "written.cycles"),
    "tasks until wear-out": ("1", "written.until_worn"),
    **{label: ("J", part) for label, part in _PARTS.items()},
    "learned": ("J", "learning"),
    **{
        f"one {token} token{label}": ("J", f"{token}.{part}")
        for token in ("source", "generated")
        for label, part in {
            **{f", {part}": part for part in ReadEnergy._fields},
            "": "total",
        }.items()
    },
    "latency of a generated token, arrays": ("s", "latency_arrays"),
    "latency of a generated token, digital": ("s", "latency_digital"),
    "adapters' arrays": ("1", "adapter_arrays"),
}
_OF_STANDING = {
    "arrays": ("1", "arrays"),
    **_WRITING,
    "words of tables": ("1", "words"),
    "energy of tables": ("J", "tables"),
}
_OF_COMPARISON = {
    "extra_per_token": "J",
    "break_even": "tokens",
}  # other ratios have no unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the bills.

    Attributes:
      shapes: of base models, by name.
      crossbars: of arrays: names or files.
      out: folder to write to.
    """

    shapes: tuple[str, ...] = (
        "flan-t5-small",
        "flan-t5-base",
        "flan-t5-large",
        "smollm2-135m",
    )
    crossbars: tuple[str, ...] = ("isaac", "puma", "neurram")
    out: Path = Path("runs/cost")


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    if unknown := [shape for shape in options.shapes if shape not in known_shapes()]:
        raise ValueError(
            f"no shapes {', '.join(unknown)}: choose of {', '.join(known_shapes())}"
        )
    lines = [
        ["shape", "preset", "method", "quantity", "unit", "low", "typical", "high"]
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    for shape in options.shapes:
        drawn = []
        for name in options.crossbars:
            asked = CostOptions(shape=shape, crossbar=name)
            config = known_shapes()[shape]
            crossbar = load_config(name)
            of = {
                activity.method: activity
                for activity in activities(config, crossbar, asked)
            }
            bills = {
                name: price(activity, crossbar, asked) for name, activity in of.items()
            }
            drawn.append((asked, bills))
            found = [
                (name, *of_bill)
                for name, bill in bills.items()
                for of_bill in quantities(bill, _OF_BILL)
            ]
            for other, compared in comparisons(of, crossbar, asked).items():
                named = {
                    what: (_OF_COMPARISON.get(what, "1"), what)
                    for what in compared._fields
                }
                found += [
                    (f"LoRA in cells : {other}", *ratio)
                    for ratio in quantities(compared, named)
                ]
            for what, standing in installed_once(config, crossbar, asked).items():
                found += [
                    (f"once: {what}", *one)
                    for one in quantities(price_once(standing), _OF_STANDING)
                ]
            lines += [[shape, asked.crossbar, *of_quantity] for of_quantity in found]
        draw(drawn, options.out / f"{shape}.png")
    write_csv(options.out / "table.csv", lines)
    print(f"written to {options.out}")


def quantities(of: Any, named: Mapping[str, tuple[str, str]]) -> Iterator[list[str]]:
    """Yield quantity, unit, low, typical and high; six digits, and whole counts."""
    for what, (unit, path) in named.items():
        if (value := attrgetter(path)(of)) is not None:
            ends = dataclasses.astuple(
                value if isinstance(value, Range) else Range.of(value)
            )
            yield [
                what,
                unit,
                *(
                    f"{end:.{12 if unit == '1' and end == int(end) else 6}g}"
                    for end in ends
                ),
            ]


def draw(found: Sequence[tuple[CostOptions, dict[str, Bill]]], path: Path) -> None:
    """Energy until a task is learned, by part, and of a generated token with its source: a column for each preset."""

    def on(figure: Any) -> None:
        from matplotlib.ticker import EngFormatter

        axes = figure.subplots(2, len(found), sharex="row", sharey=True, squeeze=False)
        for column, (options, by_name) in enumerate(found):
            bills = list(by_name.values())
            for row, of_token in enumerate((False, True)):
                axis = axes[row][column]
                for i, bill in enumerate(bills):
                    parts = {
                        label: getattr(bill, part) for label, part in _PARTS.items()
                    }
                    if of_token:
                        parts = {"": bill.inference / options.tokens_per_task}
                    for k, (label, value) in enumerate(parts.items()):
                        place = i + (0 if of_token else 0.22 * (k - 1))
                        axis.hlines(
                            place,
                            value.low,
                            value.high,
                            color=colour(k + 3),
                            linewidth=1.5,
                        )
                        legend = label if i == 0 and not of_token else None
                        axis.plot(
                            value.typical,
                            place,
                            "o",
                            color=colour(k + 3),
                            markersize=4,
                            label=legend,
                        )
                axis.set_xscale("log")
                axis.xaxis.set_major_formatter(EngFormatter("J"))
                axis.set_yticks(range(len(bills)), [bill.method for bill in bills])
                axis.grid(visible=True, axis="x")
                axis.set_xlabel(
                    "energy of a token with its source"
                    if of_token
                    else "energy to learn a task"
                )
            axes[0][column].set_title(options.crossbar)
        axes[0][0].invert_yaxis()
        figure.legend(
            *axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=3
        )
        figure.suptitle(
            f"{found[0][0].shape}: typical energy, with low and high ends",
            x=0.01,
            ha="left",
            size=12,
        )

    plot(path, (4.2 * len(found), 7.5), on)


if __name__ == "__main__":
    _script.run(main)
