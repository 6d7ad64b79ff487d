"""`lorafusion cost`: the bill of one new task."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..crossbar import (
    CONSTANTS,
    Constants,
    Range,
    ReadEnergy,
    WriteCost,
    load_config,
    load_constants,
    save_constants,
)
from ..estimates.bill import Bill, CostOptions, activities, comparisons, installed_once, price, price_once
from ..estimates.bill.show import constants_table, sentences, tables
from ..estimates.bill.show import markdown as captioned
from ..estimates.params import shape_config
from ..files import write_text, writing
from ..text_tables import markdown
from .parsing import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostCommand(CostOptions):
    """Print the writes, energy, time and wear of one new task with every method, and the cost of its tokens.

    Every figure is a range over the constants' published values. No weights are loaded.

    Examples:
      lorafusion cost --shape flan-t5-large --modules 20 --crossbar isaac
      lorafusion cost --crossbar puma --save-constants mine.yaml
      lorafusion cost --crossbar puma --constants mine.yaml --tokens-per-task 100000

    Attributes:
      constants: file that replaces the table of constants.
      save_constants: write the table in use to this .yaml or .json file, to edit it.
      json: write everything to this file.
    """

    constants: Path | None = None
    save_constants: Path | None = None
    json: Path | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.json is not None and self.json.suffix != ".json":
            raise ValueError(f"json is {self.json}: wanted a file ending in .json")


GROUPS = {
    "data and base": ("shape", "train_rows", "source", "target", "tokens_per_task"),
    "fusion": ("modules", "pool_size", "rank", "targets", "bases", "train_core"),
    "training": ("epochs", "batch_size"),
    "baseline": ("vera_rank", "evaluations"),
    "hardware": ("crossbar", "constants", "save_constants"),
    "run": ("json",),
}


def main(arguments: Sequence[str]) -> None:
    """Print the bill, and write the requested files.

    Raises:
      ValueError: a shape, target, preset or table of constants cannot be used. It is raised before files are written.
    """
    options = parse(CostCommand, arguments, "cost", groups=GROUPS)
    config, crossbar = shape_config(options.shape), load_config(options.crossbar)
    options = dataclasses.replace(options, targets=config.targets if options.targets is None else options.targets)
    constants = CONSTANTS if options.constants is None else load_constants(options.constants)
    found = {activity.method: activity for activity in activities(config, crossbar, options)}
    bills = {name: price(activity, crossbar, options, constants) for name, activity in found.items()}
    once = {name: price_once(found, constants) for name, found in installed_once(config, crossbar, options).items()}
    against = comparisons(found, crossbar, options, constants)

    if options.save_constants is not None:
        with writing(options.save_constants.parent):
            save_constants(options.save_constants, constants)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = _content(options, constants, bills)
        content["once"] = {name: _plain(o._asdict()) for name, o in once.items()}
        content["LoRA in cells over"] = {name: _plain(c._asdict()) for name, c in against.items()}
        write_text(options.json, json.dumps(content, indent=2) + "\n")

    print(
        f"One new task on {options.shape}, {options.modules} modules of rank {options.rank}, in arrays like "
        f"{options.crossbar}; {options.train_rows} rows of {options.source} + {options.target} tokens, "
        f"{options.epochs} epochs.\nEvery range is low / typical / high.\n"
    )
    print(captioned(tables(bills, once, options)))
    print("\n".join(sentences(against, bills, once, options)))
    print(f"\nConstants\n\n{markdown(constants_table(constants))}", end="")


def _content(options: CostOptions, constants: Constants, bills: dict[str, Bill]) -> dict[str, Any]:
    """Return options, constants and bills for JSON; ranges are [low, typical, high], in joules and seconds.

    An end that is infinite, such as a break-even that never comes, is null.
    """
    files = ("constants", "save_constants", "json")
    return {
        "options": {name: value for name, value in vars(options).items() if name not in files},
        "constants": {name: vars(constant) for name, constant in constants.table.items()},
        "methods": {name: _plain(bill._asdict()) | {"learning": _plain(bill.learning)} for name, bill in bills.items()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Range):
        return [None if math.isinf(end) else end for end in (value.low, value.typical, value.high)]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, WriteCost | ReadEnergy):
        return _plain(value._asdict())
    return value
