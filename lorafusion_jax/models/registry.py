"""The families of models that the package loads: one line for each."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from ..support.reading import FileError, decode_as
from . import decoder, gemma4, qwen3_5, t5
from .architecture import Architecture, Family, GGUFLayout, Model

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (t5.FAMILY, decoder.FAMILY, qwen3_5.FAMILY, gemma4.FAMILY)
}


def family_of(config: Architecture) -> Family:
    """Return the family that a structure belongs to."""
    return FAMILIES[config.family]


def abstract_model(config: Architecture) -> Model:
    """Return a model of this structure whose variables have shapes but no values."""
    return family_of(config).abstract(config)


def known_shapes() -> dict[str, Architecture]:
    """Return the known sizes of all families by name."""
    return {
        name: config
        for family in FAMILIES.values()
        for name, config in family.shapes.items()
    }


def family_of_json(raw: Mapping[str, Any]) -> Family:
    """Return the family that the content of a Hugging Face config.json belongs to; raises ValueError for none."""
    kind = raw.get("model_type")
    for family in FAMILIES.values():
        if kind in family.model_types:
            return family
    members = "; ".join(family.members for family in FAMILIES.values())
    raise ValueError(
        f"model_type is {kind!r}, which is none of the families: {members}. Give a dense model of one of them"
    )


def types_of_name(name: str) -> set[str]:
    """Return the `model_type`s that the last part of a path or hub id shows; maybe none."""
    last = last_part(name)
    patterns = [item for family in FAMILIES.values() for item in family.names.items()]
    return {
        kind
        for pattern, kinds in patterns
        if re.search(pattern, last)
        for kind in kinds
    }


def last_part(name: str) -> str:
    """Return the last part of a path or hub id in small letters, without a revision."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].partition("@")[0].lower()


def gguf_layout(
    name: str | None, by: Literal["general.architecture", "model_type"]
) -> GGUFLayout:
    """Return the layout of GGUF files, given the name of the models in such a file or in a config.json.

    Raises:
      ValueError: no family has GGUF files of this name.
    """
    layouts = [family.gguf for family in FAMILIES.values() if family.gguf is not None]
    architectures: list[str] = []
    for layout in layouts:
        if by == "model_type":
            names = layout.architectures
        else:
            names = dict.fromkeys(layout.architectures.values())
        if name in names:
            return layout
        architectures += names
    fix = " for GGUF, or --format adapter or merged" if by == "model_type" else ""
    raise ValueError(
        f"{by} is {name!r}: expected one of {', '.join(architectures)}{fix}"
    )


def paths_in_tunix(module: str) -> tuple[str, ...]:
    """Return the paths of the linear maps in a module of tunix's models; none if it is of no family."""
    return tuple(
        path
        for family in FAMILIES.values()
        if family.tunix
        for path in family.tunix(module)
    )


def recorded_config(base: Mapping[str, Any]) -> Architecture:
    """Return the structure of the base model that the manifest of a converted pool records, or raise a FileError."""
    name = base["family"]
    if name not in FAMILIES:
        fix = "restore it from a copy, or use the version that wrote it"
        raise FileError(
            "",
            field="family",
            got=repr(name),
            expected=f"one of {', '.join(FAMILIES)}",
            fix=fix,
        )
    return decode_as(base["config"], FAMILIES[name].config, "")
