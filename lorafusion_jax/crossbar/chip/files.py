"""Chips on disk: one .npz file with the arrays, the configuration and its hash."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..config.files import config_hash, from_json, has_hash, to_json
from ..config.schema import CrossbarConfig
from ..config.structure import split_config
from ..mapping.bit_fields import Packed, Packing
from .chip import Chip, reconfigured
from .plan import Plan, exact_ties

_META = "meta_json"
_ARRAYS = (
    *("codes", "scale", "cells", "columns", "units", "variance", "occupied", "flipped"),
    *("gain", "offset", "limits", "input_limit", "pulses"),
)


def save_chip(chip: Chip, path: str | Path) -> None:
    """Write a programmed chip, or a stack of them, to a file without its read key.

    Args:
      chip: the chip to write.
      path: an .npz file, which is replaced completely or not at all.
    """
    path = Path(path)
    arrays: dict[str, Any] = {}
    for name in _ARRAYS:
        value = getattr(chip, name)
        if value is None:
            continue
        parts = value._asdict() if isinstance(value, Packed) else {"": value}
        arrays |= {f"{name}.{part}".rstrip("."): np.asarray(a) for part, a in parts.items() if a is not None}
    arrays |= {f"values.{i}": np.asarray(value) for i, value in enumerate(chip.values)}
    config = _shared_config(chip)
    meta = {"config": config_hash(config), "fields": to_json(config), "shape": chip.matrix_shape}
    arrays[_META] = np.array(json.dumps(meta | {"plan": dataclasses.asdict(chip.plan)}))
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    temporary.replace(path)


def load_chip(path: str | Path, config: CrossbarConfig | None = None) -> Chip:
    """Read a programmed chip.

    Args:
      path: a file that `save_chip` wrote.
      config: the configuration that it was programmed with. None for the one in the file, which is missing if an
        earlier version wrote the file or if the configuration holds arrays or functions.

    Raises:
      ValueError: the file does not hold a chip, the chip has another configuration, or an earlier version made it with
        an error.
    """
    with np.load(path) as file:
        if _META not in file:
            raise ValueError(f"{path} does not hold programmed arrays: give a file that save_chip wrote")
        meta = json.loads(str(file[_META]))
        stored = {name: jnp.asarray(file[name]) for name in file.files if name != _META}
    if config is None:
        if meta.get("fields") is None:
            raise ValueError(f"{path} does not hold its configuration: give the one that it was programmed with")
        config = from_json(meta["fields"])
    elif not has_hash(config, meta["config"]):
        raise ValueError(
            f"{path} was programmed with another configuration ({meta['config'][:12]}, this one is "
            f"{config_hash(config)[:12]}): load it with its own, or program the weights again"
        )
    packed = {name.partition(".")[2]: a for name, a in stored.items() if name.startswith("columns.")}
    fields: dict[str, Any] = {name: stored.get(name) for name in _ARRAYS}
    if packed:
        fields["columns"] = Packed(**packed)
    plan = dict(meta["plan"])
    if "ties" not in plan:  # written before plans had it
        if fault := _earlier_fault(config, plan):
            raise ValueError(f"{path} was written by an earlier version, {fault}: program the weights again")
        limits = stored.get("limits")
        exact = exact_ties(config, None if limits is None else np.asarray(limits))
        plan["ties"] = exact if plan["integers"] else None
    if plan["packing"] is not None:
        places = {name: tuple(map(tuple, of_slices)) for name, of_slices in plan["packing"].items()}
        plan["packing"] = Packing(**places)
    structure, values = split_config(config)
    chip = Chip(**fields, values=[], structure=structure, plan=Plan(**plan))
    if own := [stored[f"values.{i}"] for i in range(len(values)) if f"values.{i}" in stored]:
        return dataclasses.replace(chip, values=own)
    return reconfigured(chip, config)


def _shared_config(chip: Chip) -> CrossbarConfig:
    """Return the configuration without the axes of a stack, unless its matrices differ in values."""
    lead = len(chip.shape) - 2
    first = [value[(0,) * lead] for value in chip.values]
    same = all(bool(jnp.all(value == one)) for value, one in zip(chip.values, first, strict=True))
    return chip.structure.config(first if same else chip.values)


def _earlier_fault(config: CrossbarConfig, plan: Mapping[str, Any]) -> str | None:
    """Return the error in arrays that were written before plans had ties, or None if they are correct."""
    if config.adc is None:
        return None
    if config.encoding.flip and config.adc.range in ("max", "calibrated"):
        return "whose ADC range left out the unit column of flipped arrays"
    if config.cell.on_off_ratio is None:
        return None
    reads_gmin = config.encoding.kind == "offset" or config.converts_each
    if config.adc.gain_error is not None and reads_gmin and plan["path"] != "definition":
        return "whose gain errors left Gmin out"
    if plan["packing"] is not None and plan["packing"]["variances"]:
        return "whose read noise of packed cells was too small"
    return None
