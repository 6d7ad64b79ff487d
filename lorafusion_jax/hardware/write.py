"""Base and pool written onto chips, once, for every run that uses them."""

import dataclasses
import math
import os

import jax

from .. import crossbar
from ..crossbar.config.files import config_fields
from ..io.pool import open_pool
from ..loading.model import digests, load_model
from ..loading.spec import LoadOptions
from ..methods.fusion import FusionRecipe
from ..support.checks import at_least, check_uint32
from ..support.options import (
    BasisOptions,
    DrawnChipsOptions,
    OutOptions,
    PoolOptions,
    PresetOptions,
)
from ..support.version import __version__
from ..support.writing import check_writable, write_json
from .chip_file import ChipFile, OneChip, cells_sha256, load_chips
from .program import program


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramOptions(
    BasisOptions, DrawnChipsOptions, PresetOptions, OutOptions, PoolOptions
):
    """Program a base model and a pool onto independent chips, and report arrays, cells, energy and time.

    Every chip has its own random errors, which are drawn from the key. `lorafusion fuse` and `lorafusion evaluate`
    take the file with --crossbar, and draw its chips again.

    Examples:
      lorafusion crossbar program --base base --pool pool --crossbar noisy.yaml --chips 8 --out noisy_chips.json
      lorafusion crossbar program --base base --pool pool --basis 32 --crossbar noisy.yaml --out basis_chips.json

    Attributes:
      pool: a converted pool, or a folder of PEFT adapter folders; all its modules are written.
      out: JSON file to write, which must not exist.
      crossbar: a preset (ideal, isaac, puma, raella, neurram, aihwkit, crosssim), a .yaml or .json file, or a folder
        that `lorafusion crossbar prepare` wrote.
      basis: write the first so many directions of the pool's shared basis instead of its modules.
      chips: number of chips.
    """

    chips: int = 1


def write_chips(options: ProgramOptions) -> ChipFile:
    """Write the file, and return its content.

    Raises:
      ValueError: before anything is written: the file exists, or a configuration, a pattern, a base or a pool
        cannot be used.
    """
    if options.out.exists():  # before a model is programmed
        raise ValueError(
            f"{options.out} exists: give another --out; chips are never overwritten"
        )
    at_least(1, chips=options.chips, basis=options.basis)
    check_uint32(chip_key=options.chip_key)
    chips = load_chips(
        options.crossbar, key=options.chip_key, digital=options.keep_digital
    )
    if options.chips > 1 and not crossbar.is_random(chips.config):
        raise ValueError(
            f"programming is not random in {options.crossbar}, so {options.chips} chips are alike: use 1"
        )
    names = open_pool(options.pool).names
    recipe = FusionRecipe(modules=len(names), basis=options.basis)
    fused = chips.checked(
        load_model(
            LoadOptions(
                base=options.base, pool=options.pool, adapters=names, recipe=recipe
            )
        )
    )
    check_writable(options.out)
    first_chip = program(
        fused.problem.graph,
        fused.problem.frozen,
        chips.rules(),
        chips.chip_key(0),
        norm="ideal",
    )
    matrices = crossbar.chips_in(first_chip)
    weight_digests = digests(fused)
    prepared = None
    if chips.prepared is not None:
        prepared = os.path.relpath(options.crossbar, options.out.parent)
    content: ChipFile = {
        "base": options.base,
        "base_sha256": weight_digests["base"],
        "pool": options.pool,
        "modules": weight_digests["modules"],
        "basis_sha256": weight_digests.get("basis"),
        "crossbar": options.crossbar,
        "config": config_fields(chips.config),
        "prepared": prepared,
        "sha256": chips.sha256,
        "digital": list(chips.digital),
        "key": options.chip_key,
        "chips": options.chips,
        "one_chip": _report(matrices),
        "cells_sha256": {chip.name: cells_sha256(chip) for chip in matrices},
        "versions": {"lorafusion-jax": __version__, "jax": jax.__version__},
    }
    write_json(options.out, content)
    return content


def _report(leaves: list[crossbar.Chip]) -> OneChip:
    total = crossbar.Counts()
    cells_in_arrays = 0
    used = 0.0
    pulses = []
    for leaf in leaves:
        matrices = math.prod(leaf.shape[:-2])
        matrix_counts = crossbar.counts(leaf.matrix_shape, leaf.config)
        total = total + matrix_counts * matrices
        explained = crossbar.explain(leaf)
        cells = explained.arrays * math.prod(explained.array) * matrices
        cells_in_arrays = cells_in_arrays + cells
        used = used + explained.utilisation * cells
        if leaf.pulses is not None:
            pulses.append((float(leaf.pulses.mean()), matrix_counts.cells * matrices))
    cost = crossbar.write_cost(total)
    return {
        "arrays": total.arrays,
        "cells": total.cells,
        "utilisation": used / cells_in_arrays,
        "pulses": list(dataclasses.astuple(cost.pulses)),
        "joules": list(dataclasses.astuple(cost.energy)),
        "seconds": list(dataclasses.astuple(cost.time)),
        "simulated_pulses": sum(p * c for p, c in pulses) / total.cells
        if pulses
        else None,
    }
