"""The cost of every method: its counts converted to joules and seconds."""

from typing import NamedTuple

from ...crossbar import (
    CONSTANTS,
    Constants,
    CrossbarConfig,
    Range,
    ReadEnergy,
    WriteCost,
    read_energy,
    read_latency,
    write_cost,
)
from ...crossbar.cost.ranges import longest, total
from ...models.architecture import Architecture
from .activity import Activity, Standing, Work, activities
from .options import CostOptions


class Once(NamedTuple):
    """Cost of the matrices and tables that exist before any task."""

    arrays: int
    written: WriteCost  # cells that are written, and the cost of writing them
    words: int  # words of the tables in memory
    tables: Range  # energy of making and writing the tables


class Bill(NamedTuple):
    """Cost of one new task with a method, in joules and seconds."""

    method: str
    trainable: int
    written: WriteCost  # cells that the task writes, and the cost of writing them
    install: (
        Range  # energy of writing the cells, and of putting the other numbers in memory
    )
    update: Range  # energy that the method adds to the base's passes in training: adapters, gradients, optimiser
    base: Range  # energy of the base's own passes in training
    source: ReadEnergy  # energy of one source token at inference; `digital` includes the attention and digital adapters
    generated: ReadEnergy  # energy of one generated token in the same form, without its share of the source
    latency_arrays: Range  # time in arrays and converters for a generated token
    latency_digital: Range  # time in the digital unit for a generated token
    adapter_arrays: int  # number of arrays that hold the method's adapters
    inference: Range  # energy of `tokens_per_task` generated tokens and their sources

    @property
    def learning(self) -> Range:
        """Energy until the task is learned and installed."""
        return self.install + self.update + self.base


def bills(
    config: Architecture, crossbar: CrossbarConfig, options: CostOptions
) -> dict[str, Bill]:
    """Return the cost of every method, by its name; the shape and arrays in the options are not used."""
    return {
        of.method: price(of, crossbar, options)
        for of in activities(config, crossbar, options)
    }


def price(
    activity: Activity,
    crossbar: CrossbarConfig,
    options: CostOptions,
    constants: Constants = CONSTANTS,
) -> Bill:
    """Return the cost of one method from its counts."""
    written = write_cost(activity.written, constants, passes=activity.passes)
    source = token_energy(activity.source, crossbar, constants)
    generated = token_energy(activity.generated, crossbar, constants)
    per_token = generated.total + source.total * (options.source / options.target)
    latencies = (  # of stages, which run in sequence; the chains of a stage run in parallel
        longest(
            total(read_latency(m, crossbar, constants) for m in chain)
            for chain in stage
        )
        * times
        for stage, times in activity.stages.items()
    )
    return Bill(
        method=activity.method,
        trainable=activity.trainable,
        written=written,
        install=written.energy
        + constants["word_energy"] * activity.installed_words
        + constants["mac_energy"] * activity.installed_macs,
        update=training_energy(activity.update_training, crossbar, constants),
        base=training_energy(activity.base_training, crossbar, constants),
        source=source,
        generated=generated,
        latency_arrays=total(latencies),
        latency_digital=constants["mac_time"] * activity.generated.macs,
        adapter_arrays=activity.adapters.arrays,
        inference=per_token * options.tokens_per_task,
    )


def price_once(standing: Standing, constants: Constants = CONSTANTS) -> Once:
    """Return the cost of matrices and tables that exist before any task."""
    tables = (
        _shared_macs(constants) * standing.macs
        + constants["word_energy"] * standing.words
    )
    return Once(
        standing.counts.arrays,
        write_cost(standing.counts, constants),
        standing.words,
        tables,
    )


def token_energy(
    work: Work, crossbar: CrossbarConfig, constants: Constants
) -> ReadEnergy:
    """Return the energy of a token by component; words are counted for all multiply-adds, as no operands are shared."""
    energy = read_energy(work.reads, crossbar, constants)
    digital = (
        constants["mac_energy"] * work.macs + constants["word_energy"] * work.words
    )
    return energy._replace(digital=energy.digital + digital)


def training_energy(
    work: Work, crossbar: CrossbarConfig, constants: Constants
) -> Range:
    """Return the energy of training, where the rows of a batch share operands."""
    digital = (
        _shared_macs(constants) * work.macs + constants["word_energy"] * work.words
    )
    return read_energy(work.reads, crossbar, constants).total + digital


def _shared_macs(constants: Constants) -> Range:
    """Return the energy of a multiply-add of a matrix product whose rows share operands."""
    return (
        constants["mac_energy"] + constants["words_per_mac"] * constants["word_energy"]
    )
