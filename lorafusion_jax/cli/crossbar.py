"""`lorafusion crossbar`: prepare a base for arrays, and program chips; `lorafusion restore`: correct them digitally."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import crossbar
from ..crossbar.config.files import config_from
from ..hardware.chip_file import ProgramOptions, write_chips
from ..hardware.prepare import PrepareOptions, prepare
from ..hardware.restore import RestoreOptions, restore_chips
from ..support.reading import show
from ..support.text_tables import plain
from .parsing import parse


def crossbar_command(arguments: Sequence[str]) -> None:
    """Prepare a base, or program chips."""
    action, *rest = arguments or ("--help",)
    if action in ("-h", "--help"):
        show(
            "prepare  changes of a base's matrices, from text, so that it loses little on any chip\n"
            "program  base and pool -> simulated chips, with the cost of writing them\n\n"
            "`lorafusion crossbar ACTION --help` lists the options of each."
        )
    elif action == "prepare":
        _prepare(rest)
    elif action == "program":
        _program(rest)
    else:
        raise ValueError(
            f"`lorafusion crossbar` has the actions prepare and program, and got {action!r}: a run is evaluated on "
            "arrays by `lorafusion evaluate --crossbar`"
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
