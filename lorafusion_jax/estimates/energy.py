"""Energy, writes and wear of one new task on arrays, a row for every method, from shapes alone.

Forward, the base's matrices and a method's frozen ones are read from arrays. Arrays are not read transposed, so the
gradient of each product is digital: one product as large for the inputs, and one for a trained matrix. Attention is
what else the traced forward pass multiplies. Embeddings, softmax and scales of columns are left out.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..crossbar import (
    CONSTANTS,
    Constants,
    Counts,
    CrossbarConfig,
    Range,
    WriteCost,
    counts,
    read_energy,
    write_cost,
)
from ..crossbar.cost.energy import preparing
from ..methods import METHODS
from ..methods.entry import CostLayout, Matrix, MethodEntry, recipe_of
from ..models.architecture import Architecture, Site, sharing_inputs, targeted
from ..support import text_tables
from ..support.checks import at_least
from ..support.options import (
    PresetOptions,
    ShapeOptions,
    StepsOptions,
    TrainRowsOptions,
)
from ..tasks import split
from .estimate import Kind, Settings, program_of, trained_numbers
from .params import shape_config
from .workload import Shape

_PREFIXES = {
    -15: "f",
    -12: "p",
    -9: "n",
    -6: "µ",
    -3: "m",
    0: "",
    3: "k",
    6: "M",
    9: "G",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostOptions(StepsOptions, PresetOptions, TrainRowsOptions, ShapeOptions):
    """Assumptions of the cost of one new task.

    Attributes:
      bases: numbers of directions of shared bases (`lorafusion convert --basis`); each has a row.
      source: number of tokens of an input.
      target: number of tokens of an answer.
    """

    bases: tuple[int, ...] = (16, 32)
    source: int = 128
    target: int = 8

    def __post_init__(self):
        at_least(
            1,
            modules=self.modules,
            rank=self.rank,
            epochs=self.epochs,
            train_rows=self.train_rows,
            batch_size=self.batch_size,
            source=self.source,
            target=self.target,
        )
        for k in self.bases:
            if not 1 <= k <= self.modules * self.rank:
                raise ValueError(
                    f"a basis of {k} directions: expected 1 to {self.modules * self.rank}, the pool's rank"
                )


class TaskCost(NamedTuple):
    """Cost of one new task with a method; energies in joules."""

    trained: int  # parameters
    written: WriteCost  # cells that the task writes, and the cost of writing them
    learned: Range  # energy of training and writing
    token: Range  # energy of a generated token, with its share of the source
    reads: Range  # the part of a token's energy that reads of arrays take


def task_costs(
    config: Architecture,
    crossbar: CrossbarConfig,
    options: CostOptions,
    constants: Constants = CONSTANTS,
) -> dict[str, TaskCost]:
    """Return the cost of every method, by its title; the shape and arrays in the options are not used."""
    numbers = {
        "modules": options.modules,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lora_rank": options.rank,
        "lora_targets": options.targets,
    }
    by_title = {}
    for entry in METHODS.values():
        bases = options.bases if entry.basis_title is not None else ()
        for basis in (None, *bases):
            recipe = recipe_of(entry.recipe, numbers | {"basis": basis})
            for title, layout in entry.cost_layouts(recipe, options.rank).items():
                by_title[title] = _task_cost(
                    config, crossbar, options, constants, entry, recipe, layout
                )
    return by_title


def digital_macs(base: str) -> float:
    """Return the multiply-adds of a target token that stay digital if all matrices of a base are in arrays.

    They are those of attention and of a tied head. The base is a folder, a file, a hub id or a known shape.
    """
    config = shape_config(base)
    shape = Shape(1, 1, 127)
    macs = program_of(config, "zero-shot", Settings(), "loss", shape).flops / 2
    # The last token of a causal model predicts nothing.
    row = shape._replace(source=shape.source - config.causal)
    in_arrays = sum(
        row.tokens(site.reads) * site.layers * site.d_in * site.d_out
        for site in config.sites.values()
    )
    if not config.tied:
        in_arrays += row.target * math.prod(config.head)
    return (macs - in_arrays) / row.target


def _task_cost(
    config: Architecture,
    crossbar: CrossbarConfig,
    options: CostOptions,
    constants: Constants,
    entry: MethodEntry,
    recipe: Any,
    layout: CostLayout,
) -> TaskCost:
    """Return the cost of a task with a method in one layout."""
    mac = constants["mac_energy"]
    word = constants["word_energy"]
    trains_base = "base" in entry.groups
    adapted = {} if trains_base else targeted(config, options.targets)
    # The last token of a causal model predicts nothing.
    row = Shape(1, options.source - config.causal, options.target)
    settings = Settings(
        recipe=recipe,
        rank=options.rank,
        targets=options.targets,
        seeds=1,
        device="accelerator",
    )

    def macs(method: str, kind: Kind) -> float:
        """Return the multiply-adds of a traced program for one row."""
        shape = Shape(1, options.source, options.target)
        return program_of(config, method, settings, kind, shape).flops / 2

    def products(
        matrices: Callable[[Site], list[Matrix]], sites: Mapping[str, Site]
    ) -> int:
        """Return the multiply-adds for a row of matrices at each site."""
        return sum(
            row.tokens(site.reads) * site.layers * d_in * d_out
            for site in sites.values()
            for d_in, d_out in matrices(site)
        )

    def reads(*, of_adapters: bool) -> Counts:
        """Return the counts of reading the base, and adapters, from arrays for a row."""
        placed = [(site, _kernel(site)) for site in config.sites.values()]
        if of_adapters:
            placed += [(site, layout.matrices(site)) for site in adapted.values()]
        total = sum(
            (
                counts(matrix, crossbar, prepares=False)
                * (times * row.tokens(site.reads) * site.layers)
                for site, matrices in placed
                for matrix, times in Counter(matrices).items()
            ),
            start=Counts(),
        )
        # Inputs are prepared once for all matrices that share them.
        for names in sharing_inputs(config.sites, config.sites):
            site = config.sites[names[0]]
            total += preparing(site.d_in, crossbar) * (
                row.tokens(site.reads) * site.layers
            )
        if not config.tied:
            total += counts(config.head, crossbar) * row.target
        return total

    rows = split(options.train_rows, (0,), limit=options.train_rows)
    epochs = options.epochs
    steps = epochs * -(-rows.train.shape[1] // options.batch_size)
    if entry.learns == "searched":
        evaluations = entry.evaluations(recipe, options.modules)
        trained_rows = 0
        forward_rows = evaluations * rows.train.shape[1]
    else:
        trained_rows = epochs * rows.train.shape[1]
        forward_rows = epochs * rows.validation.shape[1]

    # Cells that the task writes.
    passes = {"never": 0, "once": 1, "every step": steps}[layout.written]
    sites = config.sites if trains_base else adapted
    matrices_of = _kernel if trains_base else layout.matrices
    cells = sum(
        (
            counts(matrix, crossbar, prepares=False) * site.layers
            for site in sites.values()
            for matrix in matrices_of(site)
        ),
        start=Counts(),
    )
    if trains_base and not config.tied:
        cells += counts(config.head, crossbar)
    written = write_cost(cells if passes else Counts(), constants, passes=passes)

    # Multiply-adds of a row: of its products with the base, with adapters in arrays or not, and of attention.
    head = row.target * math.prod(config.head)
    base = products(_kernel, config.sites) + head
    in_arrays = products(layout.matrices, adapted)
    digital = products(layout.digital, adapted)
    forward = macs("zero-shot", "loss")
    attention = forward - base
    on_base = base - head if config.tied else base
    training_pass = attention + digital + base
    if not trains_base:
        training_pass -= on_base
    if not layout.trains_in_arrays:
        training_pass += in_arrays
    trained_products = digital
    if trains_base:
        trained_products += base
    elif layout.written != "never":
        trained_products += in_arrays
    gradients = base + in_arrays + digital + 2 * attention + trained_products
    training = (trained_rows + forward_rows) * training_pass + trained_rows * gradients
    if trained_rows:
        training += steps * macs(entry.name, "adapters")
    training_reads = Counts()
    if not trains_base:
        training_reads = reads(of_adapters=layout.trains_in_arrays)
    training_reads *= trained_rows + forward_rows
    # The rows of a batch share operands.
    learned = read_energy(training_reads, crossbar, constants).total
    learned += (mac + constants["words_per_mac"] * word) * training

    # Generation has the products of a forward pass.
    reading = read_energy(reads(of_adapters=True), crossbar, constants).total
    return TaskCost(
        trained=trained_numbers(config, entry.name, settings),
        written=written,
        learned=learned + written.energy,
        token=(reading + (mac + word) * (forward - on_base + digital)) / row.target,
        reads=reading / row.target,
    )


def _kernel(site: Site) -> list[Matrix]:
    return [(site.d_in, site.d_out)]


def energy_table(costs: Mapping[str, TaskCost]) -> str:
    """Return the costs as a Markdown table; ranges are low / typical / high."""
    head = "method,trained,cells written,energy of writing,time of writing,tasks until wear-out"
    head += ",energy until learned,energy of a token,of that reads"
    lines: list[list[str]] = [[*head.split(",")]]
    for method, cost in costs.items():
        written = cost.written
        if written.until_worn is None:
            writing = ["0", *[text_tables.EMPTY] * 3]
        else:
            writing = [
                f"{written.cells:,}",
                quantity(written.energy, "J"),
                quantity(written.time, "s"),
                number(written.until_worn),
            ]
        energies = [quantity(e, "J") for e in (cost.learned, cost.token, cost.reads)]
        lines.append([method, f"{cost.trained:,}", *writing, *energies])
    return text_tables.markdown(lines)


def quantity(value: Range, unit: str) -> str:
    """Return a range with the unit prefix of its typical value: `1.2 / 3.4 / 12 mJ`; a single number if exact."""
    exponent = 3 * math.floor(math.log10(value.typical) / 3) if value.typical else 0
    exponent = min(max(exponent, min(_PREFIXES)), max(_PREFIXES))
    return f"{number(value / 10.0**exponent)} {_PREFIXES[exponent]}{unit}"


def number(value: Range) -> str:
    """Return a range of pure numbers."""
    ends = [_digits(end) for end in (value.low, value.typical, value.high)]
    return ends[0] if len(set(ends)) == 1 else " / ".join(ends)


def _digits(value: float) -> str:
    """Return a number with three digits, without an exponent if it is easy to read without."""
    if value == 0 or 1e-3 <= value < 1e6:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:.2g}"
