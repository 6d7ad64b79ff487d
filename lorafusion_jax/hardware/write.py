"""Base and pool written onto chips, once, for every run that uses them."""

import dataclasses
import math
import shutil
from pathlib import Path

from .. import crossbar
from ..io.folders import new_folder, write_json
from ..io.pool import open_pool
from ..loading.identity import digests
from ..loading.model import load_model
from ..loading.spec import LoadOptions
from ..methods.fusion import FusionRecipe
from ..support.checks import at_least, check_uint32
from ..support.progress import progress
from ..support.version import __version__
from .folder import CONFIG, MANIFEST, Manifest, OneChip, load_chips
from .prepared import PREPARATIONS
from .program import program


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramOptions:
    """Write a base model and a pool onto independent chips, and report arrays, cells, energy and time.

    Every chip has its own random errors, which are drawn from the key. `lorafusion fuse` and `lorafusion evaluate`
    take the folder with --crossbar.

    Examples:
      lorafusion crossbar program --base base --pool pool --crossbar noisy.yaml --chips 8 --out chips/noisy
      lorafusion crossbar program --base base --pool pool --basis 32 --crossbar noisy.yaml --out chips/in_basis

    Attributes:
      base: the base model: a Hugging Face folder, a hub id or a GGUF file.
      pool: a converted pool, or a folder of PEFT adapter folders; all its modules are written.
      out: folder to write, which must not exist.
      crossbar: a preset (ideal, isaac, puma, raella, neurram, aihwkit, crosssim), a .yaml or .json file, or a folder
        that `lorafusion crossbar prepare` wrote.
      basis: write the first so many directions of the pool's shared basis instead of its modules.
      chips: number of chips.
      chip_key: key from which they are drawn.
      keep_digital: patterns of weights that stay digital: `head`, `pool.*`.
    """

    base: str
    pool: str
    out: Path
    crossbar: str = "isaac"
    basis: int | None = None
    chips: int = 1
    chip_key: int = 0
    keep_digital: tuple[str, ...] = ()


def write_chips(options: ProgramOptions) -> Manifest:
    """Write the folder (see `folder`), and return its manifest.

    Raises:
      ValueError: before anything is written: the folder exists, or a configuration, a pattern, a base or a pool
        cannot be used.
    """
    if options.out.exists():  # before hours of programming
        raise ValueError(
            f"{options.out} exists: give another --out; chips are never overwritten"
        )
    at_least(1, chips=options.chips, basis=options.basis)
    check_uint32(chip_key=options.chip_key)
    chips = load_chips(
        options.crossbar, key=options.chip_key, digital=options.keep_digital
    )
    config = chips.config
    if options.chips > 1 and not crossbar.is_random(config):
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
    with new_folder(options.out) as folder:
        problem = fused.problem
        leaves = list[crossbar.Chip]()
        with progress("chips", options.chips) as bar:
            for number in range(options.chips):
                chip = program(
                    problem.graph,
                    problem.frozen,
                    chips.rules(),
                    chips.chip_key(number),
                    norm="ideal",
                )
                leaves = crossbar.chips_in(chip)
                (chip_folder := folder / f"chip_{number}").mkdir()
                for leaf in leaves:
                    crossbar.save_chip(leaf, chip_folder / f"{leaf.name}.safetensors")
                bar.update()
        weight_digests = digests(fused)
        manifest: Manifest = {
            "base": options.base,
            "base_sha256": weight_digests["base"],
            "pool": options.pool,
            "modules": weight_digests["modules"],
            "basis_sha256": weight_digests.get("basis"),
            "config": options.crossbar,
            "config_sha256": crossbar.config_hash(config),
            "digital": list(chips.digital),
            "key": options.chip_key,
            "chips": options.chips,
            "one_chip": _report(leaves),
            "versions": {"lorafusion-jax": __version__},
        }
        crossbar.save_config(config, folder / CONFIG)
        if chips.prepared is not None:
            shutil.copytree(
                Path(options.crossbar) / PREPARATIONS, folder / PREPARATIONS
            )
        write_json(folder / MANIFEST, manifest)
    return manifest


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
