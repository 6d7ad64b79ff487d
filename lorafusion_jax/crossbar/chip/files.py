"""Chips on disk: an `ArrayState` in one .npz file, with the hash of the configuration that it was programmed under."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..config.files import config_hash
from ..config.schema import CrossbarConfig
from ..config.structure import check_same, structure_of_arrays
from ..mapping.bit_fields import Packed, Packing
from .plan import Plan, exact_ties
from .program import ArrayState

_META = "meta_json"
_STATIC = ("shape", "plan", "structure")


def save_state(state: ArrayState, config: CrossbarConfig, path: str | Path) -> None:
    """Write a programmed chip, or a stack of them.

    Args:
      state: the arrays.
      config: of the crossbar.
      path: an .npz file; replaced as a whole, or not at all.

    Raises:
      ValueError: the arrays were programmed with another configuration.
    """
    check_same(state.structure, config)
    path = Path(path)
    arrays: dict[str, Any] = {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if field.name in _STATIC or value is None:
            continue
        parts = value._asdict() if isinstance(value, Packed) else {"": value}
        arrays |= {f"{field.name}.{part}".rstrip("."): np.asarray(a) for part, a in parts.items() if a is not None}
    meta = {"config": config_hash(config), "shape": state.shape, "plan": dataclasses.asdict(state.plan)}
    arrays[_META] = np.array(json.dumps(meta))
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    temporary.replace(path)


def load_state(path: str | Path, config: CrossbarConfig) -> ArrayState:
    """Read a programmed chip.

    Args:
      path: from `save_state`.
      config: that it was programmed under.

    Raises:
      ValueError: the file holds no chip, one of another configuration, or one that an earlier version wrote wrongly.
    """
    with np.load(path) as file:
        if _META not in file:
            raise ValueError(f"{path} holds no programmed arrays: give a file that save_state wrote")
        meta = json.loads(str(file[_META]))
        stored = {name: jnp.asarray(file[name]) for name in file.files if name != _META}
    if meta["config"] != config_hash(config):
        raise ValueError(
            f"{path} was programmed under another configuration ({meta['config'][:12]}, this one is "
            f"{config_hash(config)[:12]}): load it with its own, or program the weights again"
        )
    packed = {name.partition(".")[2]: a for name, a in stored.items() if name.startswith("columns.")}
    names = [field.name for field in dataclasses.fields(ArrayState) if field.name not in _STATIC]
    fields: dict[str, Any] = {name: stored.get(name) for name in names}
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
    structure = structure_of_arrays(config)
    return ArrayState(**fields, shape=tuple(meta["shape"]), plan=Plan(**plan), structure=structure)


def _earlier_fault(config: CrossbarConfig, plan: Mapping[str, Any]) -> str | None:
    """Return what is wrong in arrays written before plans had ties; None where nothing is."""
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
