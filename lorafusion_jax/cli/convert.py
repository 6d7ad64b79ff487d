"""`lorafusion convert`: convert adapters into a pool, and make its shared basis."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..io.convert import ConvertOptions, convert
from ..io.pool import ConvertedPool
from ..support.reading import show
from ..support.text import one_line
from ..support.text_tables import plain
from .parsing import parse


def convert_command(arguments: Sequence[str]) -> None:
    """Convert the adapters and print a line for each, and one for each site of a basis."""
    options = parse(ConvertOptions, arguments, "convert")
    manifest = convert(options)
    if options.json:
        show(json.dumps(manifest, indent=2))
    elif options.adapters or options.adapters_file:
        show(report(manifest))
        totals = manifest["totals"]
        done = (
            "would be written (dry run)"
            if options.dry_run
            else f"written to {options.out}"
        )
        show(
            f"{totals['adapters']} adapters, {totals['parameters']:,} parameters, {done}"
        )
        if manifest["base"] is None:
            show(
                "without --base, these were not checked: modules, shapes, the base's family, copies of its weights"
            )
    if manifest["base"] is None and manifest["skipped"] and not options.skip_bad:
        sys.exit(1)
    if options.basis is not None:
        assert options.out is not None
        show(basis_report(options.out))


def report(manifest: Mapping[str, Any]) -> str:
    """Return a table of a pool's adapters, then the notes on them and the adapters that were left out."""
    rows = [("adapter", "modules", "rank", "scaling", "dtype", "parameters")]
    for entry in manifest["adapters"]:
        modules = [
            pair
            for row in entry["sites"].values()
            for pair in zip(*row.values(), strict=True)
            if pair[0]
        ]
        ranks, scalings = zip(*modules, strict=True)
        size = f"{entry['parameters']:,}"
        rows.append(
            (
                entry["name"],
                str(len(modules)),
                _range(ranks),
                _range(scalings),
                entry["dtype"],
                size,
            )
        )
    notes = Counter(note for entry in manifest["adapters"] for note in entry["notes"])
    notes.update(
        f"trained on {entry['trained_on']}"
        for entry in manifest["adapters"]
        if entry.get("trained_on")
    )
    lines = [f"{count} x {note}" for note, count in notes.items()]
    lines += [f"left out {entry['reason']}" for entry in manifest["skipped"]]
    return "\n".join([plain(rows), *map(one_line, lines)])


def basis_report(folder: Path) -> str:
    """Return the share of the modules' squared norms that a pool's basis keeps, by site."""
    basis = ConvertedPool(folder).basis()
    module_energies = {
        site: np.asarray(energy, float) for site, energy in basis.energy.items()
    }
    inside = {
        site: share * module_energies[site] for site, share in basis.kept().items()
    }
    rows = [("site", "d_in x d_out", "kept")]
    for site in basis.sites:
        shape = f"{basis.U[site].shape[1]} x {basis.V[site].shape[2]}"
        total = module_energies[site].sum()
        share = f"{100 * inside[site].sum() / total:.1f} %" if total else "-"
        rows.append((site, shape, share))
    summary = (
        f"a basis of {basis.k} directions for {len(basis)} modules, written to {folder}"
    )
    return f"{plain(rows)}\n{summary}"


def _range(values: Sequence[int | float]) -> str:
    low = min(values)
    high = max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"
