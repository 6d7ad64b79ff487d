"""Cost of a new task on arrays with every method, for several base models and kinds of array.

    python experiments/cost.py          # FLAN-T5-small, base, large and SmolLM2-135M on isaac, puma, neurram
    python experiments/cost.py --shapes t5-base --crossbars raella

Written to the folder: table.csv (one line for each quantity of a method, in joules, seconds and counts), and a plot for
each shape. No weights are loaded.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import _script
import tyro
from lab.common import write_csv

from lorafusion_jax.crossbar import Range, load_config
from lorafusion_jax.estimates import CostOptions, TaskCost, task_costs
from lorafusion_jax.models import known_shapes
from lorafusion_jax.report import colour, plot

# Quantity -> unit and attribute.
_QUANTITIES = {
    "trained parameters": ("1", "trained"),
    "cells written": ("1", "written.cells"),
    "write-verify pulses": ("1", "written.pulses"),
    "writing, energy": ("J", "written.energy"),
    "writing, time": ("s", "written.time"),
    "cycles of a cell": ("1", "written.cycles"),
    "tasks until wear-out": ("1", "written.until_worn"),
    "energy until learned": ("J", "learned"),
    "one generated token with its source": ("J", "token"),
    "one generated token with its source, reads": ("J", "reads"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the costs.

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
        by_crossbar = {}
        for name in options.crossbars:
            costs = task_costs(known_shapes()[shape], load_config(name), CostOptions())
            by_crossbar[name] = costs
            lines += [
                [shape, name, method, *quantity]
                for method, cost in costs.items()
                for quantity in quantities(cost)
            ]
        draw(shape, by_crossbar, options.out / f"{shape}.png")
    write_csv(options.out / "table.csv", lines)
    print(f"written to {options.out}")


def quantities(cost: TaskCost) -> Iterator[list[str]]:
    """Yield quantity, unit, low, typical and high; six digits, and whole counts."""
    for name, (unit, path) in _QUANTITIES.items():
        value = attrgetter(path)(cost)
        if value is None:
            continue
        ends = dataclasses.astuple(
            value if isinstance(value, Range) else Range.of(value)
        )
        digits = [12 if unit == "1" and end == int(end) else 6 for end in ends]
        shown = [f"{end:.{n}g}" for end, n in zip(ends, digits, strict=True)]
        yield [name, unit, *shown]


def draw(
    shape: str, by_crossbar: Mapping[str, Mapping[str, TaskCost]], path: Path
) -> None:
    """Energy until a task is learned, and of a generated token with its source: a column for each kind of array."""
    titles = {
        "learned": "energy to learn a task",
        "token": "energy of a token with its source",
    }

    def on(figure: Any) -> None:
        from matplotlib.ticker import EngFormatter

        axes = figure.subplots(
            2, len(by_crossbar), sharex="row", sharey=True, squeeze=False
        )
        for column, (name, costs) in enumerate(by_crossbar.items()):
            for row, (part, title) in enumerate(titles.items()):
                axis = axes[row][column]
                for place, cost in enumerate(costs.values()):
                    value = getattr(cost, part)
                    axis.hlines(place, value.low, value.high, color=colour(row + 3))
                    axis.plot(value.typical, place, "o", color=colour(row + 3))
                axis.set_xscale("log")
                axis.xaxis.set_major_formatter(EngFormatter("J"))
                axis.set_yticks(range(len(costs)), list(costs))
                axis.grid(visible=True, axis="x")
                axis.set_xlabel(title)
            axes[0][column].set_title(name)
        axes[0][0].invert_yaxis()
        figure.suptitle(
            f"{shape}: typical energy, with low and high ends", x=0.01, ha="left"
        )

    plot(path, (4.2 * len(by_crossbar), 7.5), on)


if __name__ == "__main__":
    _script.run(main)
