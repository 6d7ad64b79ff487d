"""`lorafusion cost`: energy, time and wear of one new task; `lorafusion params`: the parameters that methods train."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from ..crossbar import CONSTANTS, load_constants
from ..estimates import CostOptions, energy_table, shape_config, task_costs
from ..estimates.params import counts
from ..hardware.chip_file import load_chips
from ..support.options import ShapeOptions, SharedMatricesOptions
from ..support.reading import show
from ..support.text_tables import markdown
from ..support.writing import write_text
from .parsing import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostCommand(CostOptions):
    """Print the writes, energy, time and wear of one new task with every method, and the energy of its tokens.

    Every figure is a range over the constants' published values. No weights are loaded.

    Examples:
      lorafusion cost --shape flan-t5-large --modules 20 --crossbar isaac
      lorafusion cost --crossbar puma --constants mine.yaml

    Attributes:
      constants: .yaml or .json file with constants that replace those of the table.
      json: write the table to this file, in joules and seconds; ranges are low, typical and high.
    """

    constants: Path | None = None
    json: Path | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.json is not None and self.json.suffix != ".json":
            raise ValueError(f"json is {self.json}: expected a file ending in .json")


def cost_command(arguments: Sequence[str]) -> None:
    """Print the costs, and write the requested file; before that, raise ValueError for what cannot be used."""
    options = parse(CostCommand, arguments, "cost")
    config = shape_config(options.shape)
    crossbar = load_chips(options.crossbar).config
    constants = (
        CONSTANTS if options.constants is None else load_constants(options.constants)
    )
    costs = task_costs(config, crossbar, options, constants)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        methods = {
            title: cost._asdict() | {"written": cost.written._asdict()}
            for title, cost in costs.items()
        }
        text = json.dumps(methods, indent=2, default=dataclasses.astuple)
        write_text(options.json, text + "\n")
    show(
        f"One new task on {options.shape}, {options.modules} modules of rank {options.rank}, in arrays like "
        f"{options.crossbar}; {options.train_rows} rows of {options.source} + {options.target} tokens, "
        f"{options.epochs} epochs.\nEvery range is low / typical / high. A token includes its share of the input.\n"
    )
    show(energy_table(costs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamsOptions(SharedMatricesOptions, ShapeOptions):
    """Print how many numbers each method trains, exactly and without loading weights.

    Example:
      lorafusion params --shape flan-t5-large --modules 20 --rank 16

    Attributes:
      basis: number of directions of a shared basis (`lorafusion convert --basis`).
    """

    basis: int = 32


def params_command(arguments: Sequence[str]) -> None:
    """Print the counts as a Markdown table."""
    options = parse(ParamsOptions, arguments, "params")
    sizes = {name: value for name, value in vars(options).items() if name != "shape"}
    method_counts = counts(shape_config(options.shape), **sizes)
    full = method_counts["full fine-tuning"]
    lines = [
        [method, f"{count:,}", f"{100 * count / full:.4g} %"]
        for method, count in method_counts.items()
    ]
    show(
        markdown([["method", "trainable parameters", f"of {options.shape}"], *lines]),
        end="",
    )
