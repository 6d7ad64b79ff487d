"""Chips on disk: a safetensors file with the arrays, whose metadata has the configuration and its hash."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...support.writing import write
from ..config.files import config_hash, from_json, to_json
from ..config.schema import CrossbarConfig
from ..config.structure import split_config
from ..mapping.bit_fields import BitFields, FieldWords
from ..mapping.geometry import Geometry
from ..preparation.preparation import Preparation, check_preparation
from ..read.paths import PATHS
from .chip import Chip, Correction, check_correction, reconfigured
from .plan import Plan

_META = "chip"
# What the library, JSON of another layout and impossible numbers raise.
_DAMAGED = (
    SafetensorError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    json.JSONDecodeError,
)


def save_chip(chip: Chip, path: str | Path) -> None:
    """Write a programmed chip, or a stack of them, to a file, without its read key."""
    path = Path(path)
    arrays = {
        jax.tree_util.keystr(place, simple=True, separator="."): np.asarray(
            leaf, order="C"
        )
        for place, leaf in jax.tree.leaves_with_path(
            dataclasses.replace(chip, key=None, tap=None)
        )
    }
    # Without the axes of a stack, unless its matrices differ in values.
    first = [value[(0,) * (len(chip.shape) - 2)] for value in chip.values]
    same = all(
        bool(jnp.all(value == first_value))
        for value, first_value in zip(chip.values, first, strict=True)
    )
    config = chip.structure.config(first if same else chip.values)
    meta = {
        "config": config_hash(config),
        "fields": to_json(config),
        "shape": chip.matrix_shape,
        "name": chip.name,
        "plan": dataclasses.asdict(chip.plan),
    }
    if chip.preparation is not None:
        meta["preparation"] = {
            name: getattr(chip.preparation, name)
            for name in ("transforms", "white", "identity")
        }

    def writer(file: BinaryIO) -> None:
        try:
            save_file(arrays, file.name, {_META: json.dumps(meta)})
        except SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error
        # The library replaces the file by one that only its owner can read.
        Path(file.name).chmod(os.fstat(file.fileno()).st_mode)

    write(path, writer)


def load_chip(path: str | Path, config: CrossbarConfig | None = None) -> Chip:
    """Read a programmed chip.

    Args:
      path: a file that `save_chip` wrote.
      config: the configuration that it was programmed with. None for the one in the file, which is missing if
        the configuration holds arrays or functions.

    Raises:
      ValueError: the file cannot be read, or the chip has another configuration, or float64 that JAX lacks.
    """
    path = Path(path)
    try:
        return _load(path, config)
    except FileNotFoundError:
        raise
    except _DAMAGED as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): program the weights again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _load(path: Path, config: CrossbarConfig | None) -> Chip:
    with safe_open(path, framework="np") as file:
        described = (file.metadata() or {}).get(_META)
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    if described is None:
        raise ValueError(
            "it does not hold programmed arrays: give a file that save_chip wrote"
        )
    meta = json.loads(described)
    if "bit_fields" not in meta["plan"]:
        raise ValueError("an earlier version wrote it: program the weights again")
    if "codes" in arrays and arrays["codes"].dtype != (
        dtype := jax.dtypes.canonicalize_dtype(arrays["codes"].dtype)
    ):
        raise ValueError(
            f"it holds {arrays['codes'].dtype}, which JAX would make {dtype}: set jax_enable_x64 first"
        )
    stored = {name: jnp.asarray(array) for name, array in arrays.items()}
    if config is None:
        if meta.get("fields") is None:
            raise ValueError(
                "it does not hold its configuration: give the one that it was programmed with"
            )
        config = from_json(meta["fields"])
    elif config_hash(config) != meta["config"]:
        raise ValueError(
            f"it was programmed with another configuration ({meta['config'][:12]}, this one is "
            f"{config_hash(config)[:12]}): load it with its own, or program the weights again"
        )

    def parts_of(name: str) -> dict[str, Any]:
        prefix = f"{name}."
        return {
            key.removeprefix(prefix): array
            for key, array in stored.items()
            if key.startswith(prefix)
        }

    shape = stored["codes"].shape
    fields: dict[str, Any] = {
        field.name: stored.get(field.name) for field in dataclasses.fields(Chip)
    }
    if words := parts_of("columns"):
        fields["columns"] = FieldWords(**words)
    if parts := parts_of("correction"):
        fields["correction"] = Correction(**parts)
        check_correction(fields["correction"], meta["name"], shape)
    if "preparation" in meta:
        fields["preparation"] = Preparation(
            **parts_of("preparation"), **meta["preparation"]
        )
    check_preparation(fields.get("preparation"), shape, config)
    geometry = Geometry.of(shape[-2:], config)
    plan = {field.name: meta["plan"][field.name] for field in dataclasses.fields(Plan)}
    if plan["bit_fields"] is not None:
        plan["bit_fields"] = BitFields(
            **{
                name: tuple(map(tuple, slices))
                for name, slices in plan["bit_fields"].items()
            }
        )
    if plan["path"] not in PATHS:
        raise ValueError(
            f"its path is {plan['path']!r}, not one of {', '.join(PATHS)}: program the weights again"
        )
    if plan["path"] == "lookup" and config.draws_at_conversion:
        raise ValueError("its path 'lookup' draws no noise: program the weights again")
    structure, values = split_config(config)
    fields |= {
        "values": [],
        "structure": structure,
        "geometry": geometry,
        "plan": Plan(**plan),
        "key": None,
        "tap": None,
        "name": meta["name"],
    }
    chip = Chip(**fields)
    if device_values := parts_of("values"):
        return dataclasses.replace(
            chip, values=[device_values[str(i)] for i in range(len(values))]
        )
    return reconfigured(chip, config)
