"""`lorafusion convert`: convert adapters of PEFT into a pool."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..columns import plain
from ..io.convert import ConvertOptions, convert
from .parsing import parse


def main(arguments: Sequence[str]) -> None:
    """Convert the adapters and print a line for each."""
    options = parse(ConvertOptions, arguments, "convert")
    manifest = convert(options)
    print(report(manifest))
    totals = manifest["totals"]
    done = "would be written (dry run)" if options.dry_run else f"written to {options.out}"
    print(f"{totals['adapters']} adapters, {totals['parameters']:,} parameters, {done}")


def report(manifest: Mapping[str, Any]) -> str:
    """Return a table of a pool's adapters, then the notes on them and the adapters that were left out."""
    rows = [("adapter", "modules", "rank", "scaling", "dtype", "parameters")]
    for entry in manifest["adapters"]:
        modules = [pair for row in entry["sites"].values() for pair in zip(*row.values(), strict=True) if pair[0]]
        ranks, scalings = zip(*modules, strict=True)
        size = f"{entry['parameters']:,}"
        rows.append((entry["name"], str(len(modules)), _range(ranks), _range(scalings), entry["dtype"], size))
    notes = Counter(note for entry in manifest["adapters"] for note in entry["notes"])
    lines = [f"{count} x {note}" for note, count in notes.items()]
    lines += [f"left out {entry['reason']}" for entry in manifest["skipped"]]
    return "\n".join([plain(rows), *lines])


def _range(values: Sequence[int | float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"
