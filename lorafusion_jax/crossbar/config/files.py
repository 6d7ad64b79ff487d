"""Configurations as YAML or JSON, and the digest that links a saved chip to its configuration.

A file holds the fields of `CrossbarConfig` as nested tables; missing fields have their defaults. The key `model` names
the class of a device model:

    cell: {bits: [2, 2, 2, 1], on_off_ratio: 100.0}     # least significant first
    device:
      programming: {model: Independent, sigma: 0.02}
      drift: PCM_DRIFT                                  # a published model, by its name
"""

import dataclasses
import hashlib
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from ...support.reading import FileError, decode_as, error_context
from ...support.writing import write_text
from ..devices import drift, write_error
from ..devices.device import Sinh
from .presets import PRESETS
from .schema import ADC, DAC, CrossbarConfig
from .structure import split_config

# Fields that may hold one of several classes, named by the key `model`; the annotation gives the class of the others.
_MODELS: dict[str, tuple[type, ...]] = {
    "programming": (
        write_error.Independent,
        write_error.Proportional,
        write_error.Polynomial,
        write_error.Table,
    ),
    "drift": (drift.PowerLaw, drift.Relaxation),
    "iv": (Sinh,),
}
_WHAT = "a configuration is"
_UNIONS = (typing.Union, types.UnionType)
# Models with published values are constants of these modules.
_PUBLISHED = {
    field: {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _MODELS[field])
    }
    for field, module in {"programming": write_error, "drift": drift}.items()
}


def save_config(config: CrossbarConfig, path: str | Path) -> None:
    """Write every field of a configuration to a `.yaml`, `.yml` or `.json` file.

    Arrays are written as lists; `load_config` returns an equal configuration.

    Raises:
      ValueError: the suffix is another one, or a device model is a function, which a file cannot hold.
    """
    path = Path(path)
    fields = config_fields(config)
    if is_json(path, _WHAT):
        text = json.dumps(fields, indent=2) + "\n"
    else:
        text = yaml.safe_dump(fields, sort_keys=False, default_flow_style=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def load_config(name_or_path: str | Path) -> CrossbarConfig:
    """Return a preset by its name, or the configuration in a `.yaml`, `.yml` or `.json` file.

    Raises:
      ValueError: the preset is unknown, the file is missing or cannot be read, or a key or value is not valid.
    """
    if str(name_or_path) in PRESETS:
        return PRESETS[str(name_or_path)]
    path = Path(name_or_path)
    if path.suffix == "" and not path.exists():
        raise ValueError(
            f"no preset {str(path)!r}: choose one of {', '.join(PRESETS)}, or give a .yaml or .json file"
        )
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file: give one, or a preset: {', '.join(PRESETS)}"
        )
    fields = read_table(path, _WHAT)
    with error_context(path):
        return config_from({} if fields is None else fields)


def is_json(path: Path, purpose: str) -> bool:
    """Return whether a file is JSON rather than YAML, by its suffix; raises ValueError for another one."""
    suffixes = (".yaml", ".yml", ".json")
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: {purpose} a file ending in {', '.join(suffixes)}")
    return path.suffix == ".json"


def read_table(path: Path, purpose: str) -> Any:
    """Return the content of a YAML or JSON file; raises a ValueError for one that is not of its kind."""
    as_json = is_json(path, purpose)
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if as_json else yaml.safe_load(text)
    except Exception as error:  # YAML tags raise errors of many kinds
        kind = "JSON" if as_json else "YAML"
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error


def config_hash(config: CrossbarConfig) -> str:
    """Return the SHA-256 of a configuration, the same in every process, without settings that only warn (`clip_share`).

    Fields at their default do not enter, so a field that is added later changes no digest. Bits of (2, 2, 2, 2) do not
    enter either: they were the default.
    """
    adc = config.adc and dataclasses.replace(config.adc, clip_share=ADC.clip_share)
    dac = config.dac and dataclasses.replace(config.dac, clip_share=DAC.clip_share)
    config = dataclasses.replace(config, adc=adc, dac=dac)
    fields = _plain(config, "", hashed=True)
    if fields["cell"]["bits"] == [2, 2, 2, 2]:
        cell = fields.pop("cell")
        del cell["bits"]
        fields |= {"cell": cell} if cell else {}
    same = json.loads(json.dumps(fields), parse_int=float)  # 1 and 1.0 are equal
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def config_fields(config: CrossbarConfig) -> dict[str, Any]:
    """Return every field of a configuration as JSON has it; ValueError for a function, which a file cannot hold."""
    return _plain(config, "")


def config_from(fields: Any) -> CrossbarConfig:
    """Return the configuration with these fields; missing ones have their defaults."""
    return _build(CrossbarConfig, fields, "")


def to_json(config: CrossbarConfig) -> str | None:
    """Return a configuration as JSON text, or None if it holds functions or arrays, which text cannot restore."""
    if split_config(config)[1]:
        return None
    try:
        return json.dumps(config_fields(config))
    except ValueError:
        return None


def from_json(text: str) -> CrossbarConfig:
    """Return the configuration that `to_json` wrote."""
    return config_from(json.loads(text))


def _plain(value: Any, where: str, *, hashed: bool = False) -> Any:
    """Return a value as tables, lists, numbers and texts; to be hashed, without defaults, and with functions' names."""
    if isinstance(value, jax.tree_util.Partial):
        value = value.func
    elif dataclasses.is_dataclass(value):
        name = where.rpartition(".")[2]
        if name not in _MODELS or type(value) in _MODELS[name]:
            fields = {"model": type(value).__name__} if name in _MODELS else {}
            for field in dataclasses.fields(value):
                place = f"{where}.{field.name}".lstrip(".")
                plain = _plain(getattr(value, field.name), place, hashed=hashed)
                needed = not hashed or field.default is dataclasses.MISSING
                if needed or plain != _plain(field.default, place, hashed=True):
                    fields[field.name] = plain
            return fields
        value = type(value)
    elif isinstance(value, tuple | list):
        return [_plain(item, where, hashed=hashed) for item in value]
    elif isinstance(value, jax.Array | np.ndarray | np.generic):
        return value.tolist()
    elif value is None or isinstance(value, bool | int | float | str):
        return value
    if hashed:
        return f"{value.__module__}.{value.__qualname__}"
    raise ValueError(
        f"{where} is the function {getattr(value, '__qualname__', repr(value))}, which a file cannot hold: "
        "save the configuration without it and put it back with dataclasses.replace"
    )


def _build(cls: type, fields: Any, where: str) -> Any:
    """Return an object of a class from a table of its fields."""
    names = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(fields, dict):
        raise ValueError(
            f"{where or 'the file'} is {fields!r}: give a table with any of {', '.join(names)}"
        )
    for name in fields:
        if name not in names:
            path = f"{where}.{name}".lstrip(".")
            raise ValueError(f"{path} is unknown: choose from {', '.join(names)}")
    hints = typing.get_type_hints(cls)
    values = {
        name: _value(name, hints[name], value, f"{where}.{name}".lstrip("."))
        for name, value in fields.items()
    }
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"{where} lacks {field.name}: add it")
    return cls(**values)


def _value(name: str, hint: Any, value: Any, where: str) -> Any:
    """Return the value of a field with this annotation.

    Raises:
      FileError: another value; `decode_as` alone takes neither device models nor numbers that may be arrays.
    """
    if name in _MODELS:
        return None if value is None else _model(name, value, where)
    options = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    part = next(
        (option for option in options if dataclasses.is_dataclass(option)), None
    )
    if part is not None and (isinstance(value, dict) or part is hint):
        return _build(typing.cast(type, part), value, where)
    fix = "change it"
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value):
        fix = f"YAML takes {value} for a text: write a number like 1.0e-3"
    if Any not in options:
        try:
            return decode_as(value, hint, "", fix=fix)
        except FileError as error:
            raise ValueError(f"{where}: {error}") from None
    if value is None or type(value) in (int, float):
        return value
    if not _are_numbers(value):
        raise FileError(
            "",
            field=where,
            got=repr(value),
            expected="a number, a list of numbers or null",
            fix=fix,
        )
    # The ADC makes tuples of limits.
    return value if name == "limits" else np.asarray(value, float)


def _model(name: str, value: Any, where: str) -> Any:
    """Return the device model that a table or the name of a published one describes."""
    published = _PUBLISHED.get(name, {})
    classes = {cls.__name__: cls for cls in _MODELS[name]}
    if isinstance(value, str) and value in published:
        return published[value]
    if isinstance(value, dict):
        fields = dict(value)
        model = fields.pop("model", None)
        if isinstance(model, str) and model in classes:
            return _build(classes[model], fields, where)
    choices = ", ".join((*published, *(f"{{model: {cls}, ...}}" for cls in classes)))
    raise ValueError(f"{where} = {value!r}: choose from {choices}")


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) in (int, float) or _are_numbers(item) for item in value
    )
