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
                method = _Method(config, crossbar, options, entry, recipe, layout)
                by_title[title] = method.cost(constants)
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


@dataclasses.dataclass(frozen=True)
class _Method:
    """A method on arrays."""

    config: Architecture
    crossbar: CrossbarConfig
    options: CostOptions
    entry: MethodEntry
    recipe: Any
    layout: CostLayout

    @property
    def settings(self) -> Settings:
        return Settings(
            recipe=self.recipe,
            rank=self.options.rank,
            targets=self.options.targets,
            seeds=1,
            device="accelerator",
        )

    @property
    def trains_base(self) -> bool:
        return "base" in self.entry.groups

    @property
    def adapted(self) -> dict[str, Site]:
        return {} if self.trains_base else targeted(self.config, self.options.targets)

    def cost(self, constants: Constants) -> TaskCost:
        """Return the cost of a task."""
        mac = constants["mac_energy"]
        word = constants["word_energy"]
        rows = split(self.options.train_rows, (0,), limit=self.options.train_rows)
        epochs = self.options.epochs
        if self.entry.learns == "searched":
            evaluations = self.entry.evaluations(self.recipe, self.options.modules)
            trained_rows = 0
            forward_rows = evaluations * rows.train.shape[1]
        else:
            trained_rows = epochs * rows.train.shape[1]
            forward_rows = epochs * rows.validation.shape[1]
        # Multiply-adds of a row: of its products with the base, with adapters in arrays or not, and of attention.
        base = self.products(_kernel, self.config.sites) + self.head
        in_arrays = self.products(self.layout.matrices, self.adapted)
        digital = self.products(self.layout.digital, self.adapted)
        forward = self.macs("zero-shot", "loss")
        attention = forward - base
        on_base = base - self.head if self.config.tied else base
        training_pass = attention + digital + base
        if not self.trains_base:
            training_pass -= on_base
        if not self.layout.trains_in_arrays:
            training_pass += in_arrays
        trained_products = digital
        if self.trains_base:
            trained_products += base
        elif self.layout.written != "never":
            trained_products += in_arrays
        gradients = base + in_arrays + digital + 2 * attention + trained_products
        steps = epochs * -(-rows.train.shape[1] // self.options.batch_size)
        macs = (trained_rows + forward_rows) * training_pass + trained_rows * gradients
        if trained_rows:
            macs += steps * self.macs(self.entry.name, "adapters")
        reads = self.reads(in_training=True) * (trained_rows + forward_rows)
        # The rows of a batch share operands.
        learned = read_energy(reads, self.crossbar, constants).total
        learned += (mac + constants["words_per_mac"] * word) * macs
        written = self.written(constants, steps=steps)

        # Generation has the products of a forward pass.
        macs = forward - on_base + digital
        reads = self.reads(in_training=False)
        reading = read_energy(reads, self.crossbar, constants).total
        return TaskCost(
            trained=trained_numbers(self.config, self.entry.name, self.settings),
            written=written,
            learned=learned + written.energy,
            token=(reading + (mac + word) * macs) / self.row.target,
            reads=reading / self.row.target,
        )

    @property
    def row(self) -> Shape:
        """Tokens of a row; the last one of a causal model predicts nothing."""
        options = self.options
        return Shape(1, options.source - self.config.causal, options.target)

    def macs(self, method: str, kind: Kind) -> float:
        """Return the multiply-adds of a traced program for one row."""
        shape = Shape(1, self.options.source, self.options.target)
        return program_of(self.config, method, self.settings, kind, shape).flops / 2

    def written(self, constants: Constants, *, steps: int) -> WriteCost:
        """Return the cost of the cells that a task writes."""
        passes = {"never": 0, "once": 1, "every step": steps}[self.layout.written]
        sites = self.config.sites if self.trains_base else self.adapted
        matrices = _kernel if self.trains_base else self.layout.matrices
        cells = sum(
            (
                counts(matrix, self.crossbar, prepares=False) * site.layers
                for site in sites.values()
                for matrix in matrices(site)
            ),
            start=Counts(),
        )
        if self.trains_base and not self.config.tied:
            cells += counts(self.config.head, self.crossbar)
        return write_cost(cells if passes else Counts(), constants, passes=passes)

    def placed(self, *, in_training: bool) -> list[tuple[Site, list[Matrix]]]:
        """Return the sites with their matrices in arrays, those of the base first."""
        if in_training and self.trains_base:
            return []
        placed = [(site, _kernel(site)) for site in self.config.sites.values()]
        if self.layout.trains_in_arrays or not in_training:
            placed += [
                (site, self.layout.matrices(site)) for site in self.adapted.values()
            ]
        return placed

    @property
    def head(self) -> int:
        """Multiply-adds of the head for a row."""
        return self.row.target * math.prod(self.config.head)

    def products(
        self, matrices: Callable[[Site], list[Matrix]], sites: Mapping[str, Site]
    ) -> int:
        """Return the multiply-adds for a row of matrices at each site."""
        return sum(
            self.row.tokens(site.reads) * site.layers * d_in * d_out
            for site in sites.values()
            for d_in, d_out in matrices(site)
        )

    def reads(self, *, in_training: bool) -> Counts:
        """Return the counts of reading arrays for a row."""
        placed = self.placed(in_training=in_training)
        if not placed:
            return Counts()
        total = sum(
            (
                counts(matrix, self.crossbar, prepares=False)
                * (times * self.row.tokens(site.reads) * site.layers)
                for site, matrices in placed
                for matrix, times in Counter(matrices).items()
            ),
            start=Counts(),
        )
        # Inputs are prepared once for all matrices that share them.
        sites = self.config.sites
        for names in sharing_inputs(sites, sites):
            site = sites[names[0]]
            total += preparing(site.d_in, self.crossbar) * (
                self.row.tokens(site.reads) * site.layers
            )
        if not self.config.tied:
            total += counts(self.config.head, self.crossbar) * self.row.target
        return total


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
