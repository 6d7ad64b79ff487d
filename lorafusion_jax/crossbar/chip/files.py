"""Chips on disk: one .npz file with the arrays, the configuration and its hash."""

import dataclasses
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...support.reading import parse_json
from ...support.writing import write
from ..config.files import config_hash, from_json, to_json
from ..config.schema import CrossbarConfig
from ..config.structure import split_config
from ..mapping.bit_fields import Packed, Packing
from ..mapping.geometry import Geometry
from ..read.paths.registry import PATHS
from .chip import Chip, reconfigured
from .correction import Correction, check_correction
from .plan import Plan

_META = "meta_json"
_ARRAYS = (
    *("codes", "scale", "cells", "columns", "units", "variance", "occupied", "flipped"),
    *("gain", "offset", "limits", "input_limit", "pulses"),
)
# What zipfile, NumPy's headers, JSON of another layout and impossible numbers raise.
_DAMAGED = (zipfile.BadZipFile, OSError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError)
_DAMAGED += (RecursionError, NotImplementedError, json.JSONDecodeError)


def save_chip(chip: Chip, path: str | Path) -> None:
    """Write a programmed chip, or a stack of them, to a file, with its name and correction and without its read key."""
    path, arrays = Path(path), dict[str, Any]()
    for name in _ARRAYS:
        value = getattr(chip, name)
        parts = value._asdict() if isinstance(value, Packed) else {"": value}
        arrays |= {f"{name}.{part}".rstrip("."): np.asarray(a) for part, a in parts.items() if a is not None}
    arrays |= {f"values.{i}": np.asarray(value) for i, value in enumerate(chip.values)}
    if chip.correction is not None:
        parts = vars(chip.correction).items()
        arrays |= {f"correction.{part}": np.asarray(values) for part, values in parts if values is not None}
    # Without the axes of a stack, unless its matrices differ in values.
    first = [value[(0,) * (len(chip.shape) - 2)] for value in chip.values]
    same = all(bool(jnp.all(value == one)) for value, one in zip(chip.values, first, strict=True))
    config = chip.structure.config(first if same else chip.values)
    meta = {"config": config_hash(config), "fields": to_json(config), "shape": chip.matrix_shape}
    meta |= {"name": chip.name, "first": chip.first}
    arrays[_META] = np.array(json.dumps(meta | {"plan": dataclasses.asdict(chip.plan)}))
    write(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def load_chip(path: str | Path, config: CrossbarConfig | None = None) -> Chip:
    """Read a programmed chip.

    Args:
      path: a file that `save_chip` wrote.
      config: the configuration that it was programmed with. None for the one in the file, which is missing if
        the configuration holds arrays or functions.

    Raises:
      ValueError: the file cannot be read, or the chip has another configuration, or float64 that JAX lacks.
    """
    try:
        return _load(Path(path), config)
    except FileNotFoundError:
        raise
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): program the weights again") from error
    except ValueError as error:  # ours, and NumPy's of a header
        raise ValueError(f"{path}: {error}") from error


def _load(path: Path, config: CrossbarConfig | None) -> Chip:
    arrays = _arrays(path)
    if _META not in arrays:
        raise ValueError("it does not hold programmed arrays: give a file that save_chip wrote")
    meta = parse_json(str(arrays.pop(_META)))
    if "codes" in arrays and arrays["codes"].dtype != (held := jax.dtypes.canonicalize_dtype(arrays["codes"].dtype)):
        raise ValueError(f"it holds {arrays['codes'].dtype}, which JAX would make {held}: set jax_enable_x64 first")
    stored = {name: jnp.asarray(array) for name, array in arrays.items()}
    if config is None:
        if meta.get("fields") is None:
            raise ValueError("it does not hold its configuration: give the one that it was programmed with")
        config = from_json(meta["fields"])
    elif config_hash(config) != meta["config"]:
        raise ValueError(
            f"it was programmed with another configuration ({meta['config'][:12]}, this one is "
            f"{config_hash(config)[:12]}): load it with its own, or program the weights again"
        )
    packed = {name.partition(".")[2]: a for name, a in stored.items() if name.startswith("columns.")}
    fields: dict[str, Any] = {name: stored.get(name) for name in _ARRAYS}
    if packed:
        fields["columns"] = Packed(**packed)
    if parts := {name.partition(".")[2]: a for name, a in stored.items() if name.startswith("correction.")}:
        fields["correction"] = Correction(**parts)
        check_correction(fields["correction"], meta.get("name", ""), stored["codes"].shape)
    geometry, plan = Geometry.of(stored["codes"].shape[-2:], config), dict(meta["plan"])
    if plan["packing"] is not None:
        places = {name: tuple(map(tuple, of_slices)) for name, of_slices in plan["packing"].items()}
        plan["packing"] = Packing(**places)
    known = {"path": tuple(PATHS), "integers": (False, True), "ties": ("shift", "divide", None)}
    for name, choices in known.items():
        if plan[name] not in choices:
            raise ValueError(f"{name} of its plan is {plan[name]!r}, not one of {choices}: program the weights again")
    name, first = meta["name"], meta["first"]
    if not isinstance(name, str) or type(first) is not int:
        raise ValueError(f"its name is {name!r:.40} and its first layer {first!r:.40}: program the weights again")
    structure, values = split_config(config)
    chip = Chip(**fields, values=[], structure=structure, geometry=geometry, plan=Plan(**plan), name=name, first=first)
    if own := [stored[f"values.{i}"] for i in range(len(values)) if f"values.{i}" in stored]:
        return dataclasses.replace(chip, values=own)
    return reconfigured(chip, config)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file; none may be larger than its bytes in the file."""
    found, left = {}, path.stat().st_size
    if not path.is_file():
        raise ValueError("it is a pipe, a device or a folder: give a file that save_chip wrote")
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name, left = entry.filename.removesuffix(".npy"), left - entry.file_size
            if entry.compress_type != zipfile.ZIP_STORED or left < 0 or name in found:
                raise ValueError(f"{name} is compressed, shares its bytes or is there twice: program the weights again")
            content = io.BytesIO(archive.read(entry))
            version = np.lib.format.read_magic(content)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, columns_first, dtype = read(content)
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != entry.file_size - content.tell():
                raise ValueError(f"{name} is not {dtype}{list(shape)} as in its header: program the weights again")
            array = np.frombuffer(content.getbuffer()[content.tell() :], dtype)
            found[name] = array.reshape(shape, order="F" if columns_first else "C")
    return found
