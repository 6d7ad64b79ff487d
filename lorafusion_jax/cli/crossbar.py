"""`lorafusion crossbar`: a run on arrays; `lorafusion crossbar program`: base and pool onto chips."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..columns import plain
from ..hardware.report import CrossbarOptions, evaluate_on_arrays, results_path
from ..hardware.write import ProgramOptions, program_chips
from .parsing import parse
from .scores import loss


def main(arguments: Sequence[str]) -> None:
    """Evaluate on arrays, or program chips, and print a report."""
    if list(arguments[:1]) == ["program"]:
        program = parse(ProgramOptions, arguments[1:], "crossbar program")
        print(programmed_report(program_chips(program)))
        print(f"written to {program.out}")
        return
    options = parse(CrossbarOptions, arguments, "crossbar")
    results = evaluate_on_arrays(options)
    print(site_table(results))
    lines = [["seed", "chip", "exact match %", "loss"]]
    for chip in ({"chip": "digital", "seeds": results["digital"]}, *results["chips"]):
        for row in chip["seeds"]:
            lines.append([str(row["seed"]), str(chip["chip"]), f"{row['exact_match']:.1f}", loss(row["loss"])])
    print(plain(lines, left=(0, 1, 3)))
    print(f"written to {results_path(options)}")


def site_table(results: Mapping[str, Any]) -> str:
    """Return a table of the sites: arrays, use of their cells, conversions, and errors over all chips."""
    head = ["site", "matrices", "arrays", "cells used", "conversions", "path", "SQNR dB", "worst", "clipped"]
    lines = [head]
    for site in results["sites"]:
        rows = [row for chip in results["chips"] for row in chip["matrices"] if _is_of(row, site)]
        errors = ["", "", ""]
        if rows:
            sqnr = [row["sqnr"] for row in rows]
            errors = [f"{statistics.fmean(sqnr):.1f}", f"{min(sqnr):.1f}", f"{max(row['clipped'] for row in rows):.2%}"]
        counts = [f"{site['matrices']:,}", f"{site['arrays']:,}", f"{site['utilisation']:.1%}"]
        name = site["site"] if site["layers"] is None else f"{site['site']}[{site['layers'][0]}:{site['layers'][1]}]"
        lines.append([name, *counts, f"{site['conversions']:,}", site["path"], *errors])
    lines.append(["all", "", f"{results['arrays']:,}", *[""] * 6])
    return plain(lines, left=(0, head.index("path")))


def programmed_report(manifest: Mapping[str, Any]) -> str:
    """Return how many arrays, cells, pulses, joules and seconds one chip takes."""
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


def _is_of(row: Mapping[str, Any], site: Mapping[str, Any]) -> bool:
    """Return whether a matrix is one of a site's."""
    return row["site"] == site["site"] and (site["layers"] is None or row["layer"] in range(*site["layers"]))
