"""`lorafusion cost`: the bill of one new task, printed and written."""

import json
from typing import Any

from ...crossbar import (
    CONSTANTS,
    Constants,
    Range,
    ReadEnergy,
    WriteCost,
    load_config,
    load_constants,
    save_constants,
    write_cost,
)
from ...report.files import write_text
from ...report.formats import aligned
from ..params import shape_config
from .activity import activities, installed_once
from .bill import Bill, price
from .comparison import comparisons
from .options import CostOptions
from .show import constants_table, markdown, sentences, tables


def cost(options: CostOptions) -> None:
    """Print the bill, and write what was asked for.

    Raises:
      ValueError: a shape, target, preset or table of constants that cannot be used, before anything is written.
    """
    config, crossbar = shape_config(options.shape), load_config(options.preset)
    constants = CONSTANTS if options.constants is None else load_constants(options.constants)
    found = {activity.method: activity for activity in activities(config, crossbar, options)}
    bills = {name: price(activity, crossbar, options, constants) for name, activity in found.items()}
    once = {
        name: (counts.arrays, write_cost(counts, constants))
        for name, counts in installed_once(config, crossbar, options).items()
    }
    against = comparisons(found, crossbar, options, constants)
    pool = list(once.values())[1][1]

    if options.save_constants is not None:
        save_constants(options.save_constants, constants)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = _content(options, constants, bills)
        content["once"] = {
            name: {"arrays": arrays} | _plain(written._asdict()) for name, (arrays, written) in once.items()
        }
        content["LoRA in cells over"] = {name: _plain(c._asdict()) for name, c in against.items()}
        write_text(options.json, json.dumps(content, indent=2) + "\n")

    print(
        f"One new task on {options.shape}, {options.adapters} modules of rank {options.rank}, in arrays like "
        f"{options.preset}; {options.train_rows} rows of {options.source} + {options.target} tokens, {options.epochs} "
        "epochs.\nEvery range is low / typical / high.\n"
    )
    print(markdown(tables(bills, once, options)))
    print("\n".join(sentences(against, bills, pool, options)))
    print(f"\nConstants\n\n{aligned(constants_table(constants))}", end="")


def _content(options: CostOptions, constants: Constants, bills: dict[str, Bill]) -> dict[str, Any]:
    """Return options, constants and bills as JSON has them; ranges are [low, typical, high] in joules and seconds."""
    files = ("constants", "save_constants", "json")
    return {
        "options": {name: value for name, value in vars(options).items() if name not in files},
        "constants": {name: vars(constant) for name, constant in constants.table.items()},
        "methods": {name: _plain(bill._asdict()) | {"learning": _plain(bill.learning)} for name, bill in bills.items()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Range):
        return [value.low, value.typical, value.high]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, WriteCost | ReadEnergy):
        return _plain(value._asdict())
    return value
