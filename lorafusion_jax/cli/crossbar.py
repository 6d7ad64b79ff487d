"""`lorafusion crossbar`: prepare a base, program chips, explore arrays; `lorafusion restore`: correct chips."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import crossbar
from ..crossbar.config.files import config_from
from ..estimates import digital_macs, quantity
from ..hardware.chip_file import ProgramOptions, write_chips
from ..hardware.explore import ExploreOptions, explore, save_best
from ..hardware.prepare import PrepareOptions, prepare
from ..hardware.restore import RestoreOptions, restore_chips
from ..report.plots import colour, plot
from ..support.reading import show
from ..support.text_tables import plain
from .parsing import parse


def crossbar_command(arguments: Sequence[str]) -> None:
    """Prepare a base, or program chips."""
    action, *rest = arguments or ("--help",)
    if action in ("-h", "--help"):
        show(
            "prepare  changes of a base's matrices, from text, so that it loses little on any chip\n"
            "program  base and pool -> simulated chips, with the cost of writing them\n"
            "explore  the cheapest arrays on which a base loses at most so much\n\n"
            "`lorafusion crossbar ACTION --help` lists the options of each."
        )
    elif action == "prepare":
        _prepare(rest)
    elif action == "program":
        _program(rest)
    elif action == "explore":
        _explore(rest)
    else:
        raise ValueError(
            f"`lorafusion crossbar` has the actions prepare, program and explore, and got {action!r}: a run is "
            "evaluated on arrays by `lorafusion evaluate --crossbar`"
        )


def _prepare(arguments: Sequence[str]) -> None:
    """Prepare a base, and print the errors of each site that are expected before and after."""
    options = parse(PrepareOptions, arguments, "crossbar prepare")
    lines = [["site", "before", "after"]]
    for name, site in prepare(options)["sites"].items():
        lines.append(
            [
                name,
                *(
                    f"{np.mean(errors):.3g}"
                    for errors in (site["before"], site["after"])
                ),
            ]
        )
    show(
        f"expected error power on any chip, as a share of the outputs':\n{plain(lines, left=(0,))}"
    )
    _show_unused_levels(crossbar.load_config(options.crossbar))
    show(f"written to {options.out}: give it to other commands with --crossbar")


def _program(arguments: Sequence[str]) -> None:
    """Program chips, and print the cost of each."""
    options = parse(ProgramOptions, arguments, "crossbar program")
    chips = write_chips(options)
    show(programmed_report(chips))
    _show_unused_levels(config_from(chips["config"]))
    show(f"written to {options.out}")


def _explore(arguments: Sequence[str]) -> None:
    """Compare configurations, print and draw them, and exit with 1 if none is below the bound."""
    options = parse(ExploreOptions, arguments, "crossbar explore")
    exploration = explore(options, macs=digital_macs(options.base))
    sensitivities = [["kind", "cells", "converters"]]
    for kind, values in exploration.sensitivities.items():
        sensitivities.append([kind, *(f"{value:.3g}" for value in values)])
    show(f"loss over relative error power, nats:\n{plain(sensitivities)}\n")
    choice = exploration.choose(options.loss)
    show(front_table(exploration))
    draw_front(exploration, options.loss, options.out / "front.png")
    best = save_best(options, exploration.grid[choice.label])
    show(f"\n{sentence(exploration, choice, options.loss)}")
    show(f"written to {options.out}: give {best} to other commands with --crossbar")
    if not choice.meets:
        sys.exit(1)


def sentence(
    exploration: crossbar.Exploration, choice: crossbar.Choice, bound: float
) -> str:
    """Return a sentence on the configuration that is named, with its confirmed loss and its price."""
    cost = exploration.costs[choice.label]
    excess = choice.excess
    start = f"{choice.label} is the cheapest that loses less than {bound:g} nats"
    if not choice.meets:
        start = f"No configuration loses less than {bound:g} nats; the best is {choice.label}"
    return (
        f"{start}: on other text and chips {excess.mean:.4f} ({excess.low:.4f} to {excess.high:.4f}, 90th percentile "
        f"of chips {choice.percentile_90:.4f}) above the digital base as read, a perplexity {np.exp(excess.mean):.3f} "
        f"times as large, and {choice.above_rounded:.4f} above perfect cells and converters of these bits; "
        f"{quantity(cost.energy, 'J')} and {quantity(cost.latency, 's')} a token, {cost.written.arrays:,} arrays, "
        f"{quantity(cost.writing.energy, 'J')} and {quantity(cost.writing.time, 's')} to write."
    )


def front_table(exploration: crossbar.Exploration) -> str:
    """Return a table of the front: predicted and simulated loss, energy of a token by component, arrays, pulses."""
    head = "configuration,predicted,simulated,perplexity,nJ/token,array,DAC,ADC,shift-add,digital,us/token,arrays,"
    lines = [[*f"{head}conversions,pulses".split(",")]]
    for label in exploration.front:
        cost = exploration.costs[label]
        loss = exploration.predicted[label]
        simulated = "-"
        if label in exploration.simulated:
            excess = exploration.simulated[label]
            loss = excess.mean
            simulated = f"{loss:.4f} ({excess.low:.4f} to {excess.high:.4f})"
        reading = cost.reading
        parts = [reading.array, reading.dac, reading.adc, reading.shift_add]
        energies = [cost.energy, *parts, reading.digital + cost.digital]
        lines.append(
            [
                label,
                f"{exploration.predicted[label]:.4f}",
                simulated,
                f"{np.exp(loss):.3f}",
                *(f"{1e9 * energy.typical:.3g}" for energy in energies),
                f"{1e6 * cost.latency.typical:.3g}",
                f"{cost.written.arrays:,}",
                f"{cost.conversions:,}",
                f"{cost.writing.pulses.typical:.3g}",
            ]
        )
    return plain(lines)


def draw_front(exploration: crossbar.Exploration, bound: float, path: Path) -> None:
    """Draw loss against energy: predicted for all configurations, simulated for those that were."""
    energies = {label: cost.energy.typical for label, cost in exploration.costs.items()}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        losses = [exploration.predicted[label] for label in energies]
        axes.plot([*energies.values()], losses, ".", color=colour(0), label="predicted")
        for number, (label, excess) in enumerate(exploration.simulated.items()):
            limits = [[excess.mean - excess.low], [excess.high - excess.mean]]
            axes.errorbar(
                energies[label],
                excess.mean,
                limits,
                fmt="o",
                color=colour(3),
                label="simulated" if number == 0 else None,
            )
        axes.axhline(bound, linestyle="--", color=colour(5), label="bound")
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=bound)
        axes.set_xlabel("energy of a token, J")
        axes.set_ylabel("nats above the digital model")
        axes.legend()

    plot(path, (6.0, 4.0), draw)


def _show_unused_levels(config: crossbar.CrossbarConfig) -> None:
    if sentence := crossbar.unused_levels(config):
        show(f"warning: {sentence}")


def programmed_report(chips: Mapping[str, Any]) -> str:
    """Return a table of the arrays, cells, pulses, joules and seconds of one chip."""
    one = chips["one_chip"]
    ranges = {
        name: " / ".join(f"{value:.3g}" for value in one[name])
        for name in ("pulses", "joules", "seconds")
    }
    lines = [
        ["  arrays", f"{one['arrays']:,}"],
        [
            "  cells",
            f"{one['cells']:,} written, {one['utilisation']:.1%} of the arrays'",
        ],
        ["  pulses", f"{ranges['pulses']} (low / typical / high)"],
        ["  programming", f"{ranges['joules']} J, {ranges['seconds']} s"],
    ]
    if one["simulated_pulses"] is not None:
        lines.append(
            [
                "  write-verify",
                f"{one['simulated_pulses']:.2f} pulses a cell, as simulated",
            ]
        )
    return f"{chips['chips']} chips of {chips['crossbar']}, each:\n{plain(lines, left=(0, 1))}"


def restore_command(arguments: Sequence[str]) -> None:
    """Correct a base on chips, and print the divergence from the digital model before and after."""
    options = parse(RestoreOptions, arguments, "restore")
    made = restore_chips(options)
    divergences = {str(chip): manifest["divergence"] for chip, manifest in made.items()}
    divergences["mean"] = np.mean(list(divergences.values()), axis=0).tolist()
    lines = [["chip", "before", "after"]]
    lines += [
        [chip, *(f"{value:.4f}" for value in values)]
        for chip, values in divergences.items()
    ]
    first = next(iter(made.values()))
    show(
        f"{first['numbers']:,} digital parameters a chip, {first['share']:.2%} of the weights in arrays"
    )
    show(
        f"KL from the digital model, nats per token of text left out:\n{plain(lines, left=(0,))}"
    )
    show(f"written to {options.out}")
