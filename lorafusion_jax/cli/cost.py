"""`lorafusion cost`: the energy, time and wear of one new task."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..crossbar import CONSTANTS, Range, ReadEnergy, WriteCost, load_constants
from ..estimates import bill
from ..estimates.bill.show import comparison_table, constants_table, tables
from ..estimates.bill.show import markdown as captioned
from ..estimates.params import shape_config
from ..hardware.chip_file import load_chips
from ..support.reading import show
from ..support.writing import write_text
from .parsing import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostCommand(bill.CostOptions):
    """Print the writes, energy, time and wear of one new task with every method, and the cost of its tokens.

    Every figure is a range over the constants' published values. No weights are loaded.

    Examples:
      lorafusion cost --shape flan-t5-large --modules 20 --crossbar isaac
      lorafusion cost --crossbar puma --constants mine.yaml --tokens-per-task 100000

    Attributes:
      constants: .yaml or .json file with constants that replace those of the table.
      json: write everything to this file.
    """

    constants: Path | None = None
    json: Path | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.json is not None and self.json.suffix != ".json":
            raise ValueError(f"json is {self.json}: expected a file ending in .json")


GROUPS = {
    "data and base": ("shape", "train_rows", "source", "target", "tokens_per_task"),
    "fusion": ("modules", "pool_size", "rank", "targets", "bases"),
    "training": ("epochs", "batch_size"),
    "baseline": ("vera_rank", "evaluations"),
    "hardware": ("crossbar", "constants"),
    "run": ("json",),
}


def main(arguments: Sequence[str]) -> None:
    """Print the costs, and write the requested files; before that, raise ValueError for what cannot be used."""
    options = parse(CostCommand, arguments, "cost", groups=GROUPS)
    config = shape_config(options.shape)
    crossbar = load_chips(options.crossbar).config
    options = dataclasses.replace(
        options, targets=config.targets if options.targets is None else options.targets
    )
    constants = (
        CONSTANTS if options.constants is None else load_constants(options.constants)
    )
    activities = {
        activity.method: activity
        for activity in bill.activities(config, crossbar, options)
    }
    bills = {
        name: bill.price(activity, crossbar, options, constants)
        for name, activity in activities.items()
    }
    once = {
        name: bill.price_once(of, constants)
        for name, of in bill.installed_once(config, crossbar, options).items()
    }
    against = bill.comparisons(activities, crossbar, options, constants)

    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "options": {
                name: value
                for name, value in vars(options).items()
                if name not in ("constants", "json")
            },
            "constants": {
                name: vars(constant) for name, constant in constants.table.items()
            },
            "methods": {
                name: one._asdict() | {"learning": one.learning}
                for name, one in bills.items()
            },
            "once": once,
            "LoRA in cells over": against,
        }
        write_text(options.json, json.dumps(_plain(content), indent=2) + "\n")

    show(
        f"One new task on {options.shape}, {options.modules} modules of rank {options.rank}, in arrays like "
        f"{options.crossbar}; {options.train_rows} rows of {options.source} + {options.target} tokens, "
        f"{options.epochs} epochs.\nEvery range is low / typical / high.\n"
    )
    shown = tables(bills, once, options)
    shown["LoRA in cells and LoRAFusion"] = comparison_table(against)
    shown["Constants"] = constants_table(constants)
    show(captioned(shown), end="")


def _plain(value: Any) -> Any:
    """Return a value for JSON; ranges are [low, typical, high], in joules and seconds, and null if infinite."""
    if isinstance(value, Range):
        return [
            None if math.isinf(end) else end
            for end in (value.low, value.typical, value.high)
        ]
    if isinstance(
        value, bill.Bill | bill.Comparison | bill.Once | ReadEnergy | WriteCost
    ):
        value = value._asdict()
    return (
        {name: _plain(each) for name, each in value.items()}
        if isinstance(value, dict)
        else value
    )
