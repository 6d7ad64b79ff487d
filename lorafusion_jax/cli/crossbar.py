"""`lorafusion crossbar program`: write base and pool onto simulated chips."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..hardware.write import ProgramOptions, write_chips
from ..support.reading import show
from ..support.text_tables import plain
from .parsing import parse

GROUPS = {
    "data and base": ("base", "pool"),
    "hardware": ("crossbar", "chips", "keep_digital", "chip_key"),
    "run": ("out",),
}


def main(arguments: Sequence[str]) -> None:
    """Program chips, and print the cost of each."""
    action, *rest = arguments or ("--help",)
    if action in ("-h", "--help"):
        action, rest = "program", ["--help"]
    if action != "program":
        raise ValueError(
            f"`lorafusion crossbar` has one action, program, and got {action!r}: a run is evaluated on arrays by "
            "`lorafusion evaluate --crossbar`"
        )
    options = parse(ProgramOptions, rest, "crossbar program", groups=GROUPS)
    show(programmed_report(write_chips(options)))
    show(f"written to {options.out}")


def programmed_report(manifest: Mapping[str, Any]) -> str:
    """Return a table of the arrays, cells, pulses, joules and seconds of one chip."""
    one = manifest["one_chip"]
    ranges = {name: " / ".join(f"{value:.3g}" for value in one[name]) for name in ("pulses", "joules", "seconds")}
    lines = [
        ["  arrays", f"{one['arrays']:,}"],
        ["  cells", f"{one['cells']:,} written, {one['utilisation']:.1%} of the arrays'"],
        ["  pulses", f"{ranges['pulses']} (low / typical / high)"],
        ["  programming", f"{ranges['joules']} J, {ranges['seconds']} s"],
    ]
    if one["simulated_pulses"] is not None:
        lines.append(["  write-verify", f"{one['simulated_pulses']:.2f} pulses a cell, as simulated"])
    return f"{manifest['chips']} chips of {manifest['config']}, each:\n{plain(lines, left=(0, 1))}"
