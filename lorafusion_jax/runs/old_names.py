"""All renamed and removed options and fields, so that runs and result rows of earlier versions can be read.

The command line refuses an old spelling with the new one.
"""

from typing import Any

from ..methods import METHODS, fields_of

# Old name -> new name. Those of the command line are written with dashes.
RENAMED: dict[str, str] = {"path": "seed_mode", "noise": "train_chip", "core": "train_core", "digital": "keep_digital"}
# Old values -> new ones, by the new name.
VALUES = {"seed_mode": {"vmap": "batched", "map": "sequential"}, "control": {"random": "random-factors"}}
# Options that were removed.
REMOVED = frozenset({"log"})
# A recipe once had the numbers of all methods.
SHARED = frozenset({
    *("modules", "choose", "composition", "basis", "train_core", "granularity", "start", "differentiate_norm"),
    *("lr_coefficients", "lr_magnitudes", "lr_core", "lr_lora", "lr_vera", "lr_full", "l2", "l1", "prune"),
    *("lora_rank", "lora_targets", "vera_rank", "evaluations", "generations", "population", "shots"),
    *("merge", "density"),
})  # fmt: skip


def renamed(fields: Any) -> Any:
    """Return an object of JSON with the new names and values of its fields, without those that were removed."""
    if not isinstance(fields, dict):
        return fields
    given: dict[str, Any] = fields
    found = dict[str, Any]()
    for name, value in given.items():
        if name in REMOVED:
            continue
        new = RENAMED.get(name, name)
        found[new] = VALUES.get(new, {}).get(value, value) if isinstance(value, str) else value
    return found


def new_options(options: Any) -> Any:
    """Return the options of a run, as JSON, with the new names and without the numbers of other methods."""
    if not isinstance(options, dict):
        return options
    found = renamed(options)
    if isinstance(found.get("recipe"), dict):  # earlier versions padded every row
        found["recipe"] = {"pack": False} | found["recipe"]
    if "seed_mode" in options:
        return found
    for group in ("recipe", "arrays"):
        if group in found:
            found[group] = renamed(found[group])
    method = found.get("method", "fusion")
    if isinstance(found.get("recipe"), dict) and isinstance(method, str) and method in METHODS:
        others = SHARED - set(fields_of(METHODS[method]))
        found["recipe"] = {name: value for name, value in found["recipe"].items() if name not in others}
    return found


def new_record(record: Any) -> Any:
    """Return the configuration or results of a run, as JSON, with the new names."""
    if not isinstance(record, dict):
        return record
    found = dict(record)
    if "options" in found:
        found["options"] = new_options(found["options"])
    if "environment" in found:
        found["environment"] = renamed(found["environment"])
    return found
