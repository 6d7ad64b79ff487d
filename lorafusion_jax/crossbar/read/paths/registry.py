"""The read paths by name, and the choice among them. The first one that has a reason to be chosen is."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float

from ...chip.chip import Chip
from ...chip.plan import ON_REQUEST, Facts, Plan
from ...config.schema import CrossbarConfig
from ...mapping import decoding, encoding
from ...mapping.adc.quantiser import Converter
from ...mapping.geometry import Columns, Geometry
from ..definition import DefinitionPath
from .kernel import LoopPath, PackedPath
from .lookup import LookupPath
from .path import ReadPath
from .product import ProductPath

PATHS: dict[str, ReadPath] = {
    path.name: path
    for path in (
        ProductPath(),
        DefinitionPath(),
        LookupPath(),
        PackedPath(),
        LoopPath(),
    )
}
# Vectors from which a whole model's arrays are read by `lookup`.
_MANY = 64


def choose(
    geometry: Geometry,
    config: CrossbarConfig,
    limits: Array | np.ndarray | None,
    *,
    perfect: bool,
    path: str | None = None,
) -> Plan:
    """Return the fastest exact path for `limits` [_, K, 2]; raises a ValueError if the requested one is not exact."""
    facts = Facts.of(geometry, config, limits, perfect=perfect)
    reason = ON_REQUEST
    if path is None:
        reasons = ((name, each.chosen(facts)) for name, each in PATHS.items())
        path, reason = next(
            (name, reason) for name, reason in reasons if reason is not None
        )
    elif path not in PATHS:
        raise ValueError(
            f"path={path!r} is unknown: choose from {', '.join(PATHS)}, or leave it out"
        )
    elif why := PATHS[path].refusal(facts):
        raise ValueError(f"path={path!r} {why}; leave path out")
    return Plan(path, reason, facts.integers, ties=facts.ties)


def read(
    n: Float[Array, "B d_in"], quantise: Converter | None, chip: Chip
) -> Float[Array, "B d_out"]:
    """Return weights times input codes, by the plan's path."""
    if chip.plan.tabulates and PATHS[chip.plan.path].converts and len(n) >= _MANY:
        plan = dataclasses.replace(chip.plan, path=LookupPath.name)
        chip = dataclasses.replace(chip, occupied=None, plan=plan)
    return PATHS[chip.plan.path].read(n, quantise, chip)


def columns_of(chip: Chip) -> Columns:
    """Return the columns that multiply the inputs in the arrays, unit columns last."""
    config = chip.config
    geometry = chip.geometry
    if (
        chip.plan.bit_fields is not None or chip.columns is None
    ):  # perfect cells, which follow from the codes
        if (
            config.encoding.kind == "differential" and not config.converts_each
        ):  # the difference of a pair is the digit
            return encoding.split(
                encoding.digits(chip.codes, geometry, config),
                geometry.rows,
                1,
                front=True,
            )
        cells, _ = encoding.to_arrays(
            encoding.digits(chip.codes, geometry, config), geometry, config
        )
        return decoding.columns(cells, geometry, config)
    assert isinstance(chip.columns, jax.Array)
    return chip.columns.astype(chip.codes.dtype)
