"""Counts to joules and seconds: the bill of every method."""

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
from .activity import Activity, Work, activities
from .options import CostOptions


class Bill(NamedTuple):
    """What one new task costs with a method. Joules and seconds.

    Attributes:
      method: its name.
      trainable: numbers.
      written: cells, and what writing them takes, for the task.
      install: energy of writing the cells, and the other trained numbers into memory.
      update: energy of what the method adds to the base's passes in training: adapters, gradients, optimiser.
      base: energy of the base's own passes in training.
      source: energy of one source token at inference; `digital` has the attention, and adapters beside the arrays.
      generated: energy of one generated token likewise, without its share of the source.
      latency_arrays: of a generated token, waiting for arrays and converters.
      latency_digital: of a generated token, the digital unit.
      adapter_arrays: that the method's adapters stand in.
      inference: energy of `tokens_per_task` generated tokens and the sources that they answer.
    """

    method: str
    trainable: int
    written: WriteCost
    install: Range
    update: Range
    base: Range
    source: ReadEnergy
    generated: ReadEnergy
    latency_arrays: Range
    latency_digital: Range
    adapter_arrays: int
    inference: Range

    @property
    def learning(self) -> Range:
        """Energy until the task is learned and in its place."""
        return self.install + self.update + self.base

    @property
    def task(self) -> Range:
        """Energy of the task: learning it, and its tokens."""
        return self.learning + self.inference


def bills(
    config: Architecture, crossbar: CrossbarConfig, options: CostOptions, constants: Constants = CONSTANTS
) -> dict[str, Bill]:
    """Return the bill of every method, by its name.

    Args:
      config: the base model.
      crossbar: the arrays.
      options: all but its shape and arrays.
      constants: of devices, converters and digital logic.

    Raises:
      ValueError: as `activities` and `read_energy` do.
    """
    found = activities(config, crossbar, options)
    return {activity.method: price(activity, crossbar, options, constants) for activity in found}


def price(activity: Activity, crossbar: CrossbarConfig, options: CostOptions, constants: Constants = CONSTANTS) -> Bill:
    """Return the bill of one method from what it does; the arguments are those of `bills`."""
    written = write_cost(activity.written, constants, passes=activity.passes)
    source, generated = (token_energy(work, crossbar, constants) for work in (activity.source, activity.generated))
    per_token = generated.total + source.total * (options.source / options.target)
    return Bill(
        method=activity.method,
        trainable=activity.trainable,
        written=written,
        install=written.energy + constants["word_energy"] * activity.installed_words,
        update=training_energy(activity.update_training, crossbar, constants),
        base=training_energy(activity.base_training, crossbar, constants),
        source=source,
        generated=generated,
        latency_arrays=_latency(activity, crossbar, constants),
        latency_digital=constants["mac_time"] * activity.generated.macs,
        adapter_arrays=activity.adapters.arrays,
        inference=per_token * options.tokens_per_task,
    )


def token_energy(work: Work, crossbar: CrossbarConfig, constants: Constants) -> ReadEnergy:
    """Return the energy of a token by component; its multiply-adds share no operands, their words are counted."""
    found = read_energy(work.reads, crossbar, constants)
    beside = constants["mac_energy"] * work.macs + constants["word_energy"] * work.words
    return found._replace(digital=found.digital + beside)


def training_energy(work: Work, crossbar: CrossbarConfig, constants: Constants) -> Range:
    """Return the energy of training, where operands of batches are shared."""
    mac = constants["mac_energy"] + constants["words_per_mac"] * constants["word_energy"]
    return read_energy(work.reads, crossbar, constants).total + mac * work.macs + constants["word_energy"] * work.words


def _latency(activity: Activity, crossbar: CrossbarConfig, constants: Constants) -> Range:
    """Return the seconds of a generated token's products, stage after stage, the chains of a stage side by side."""
    return total(
        longest(total(read_latency(m, crossbar, constants) for m in chain) for chain in stage) * times
        for stage, times in activity.stages.items()
    )
