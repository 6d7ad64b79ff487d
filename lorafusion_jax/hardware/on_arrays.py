"""A run, digitally or on arrays: its chips for training and for evaluation."""

import dataclasses
from collections.abc import Sequence
from typing import overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..adapters.pool import LoraPool
from ..crossbar import CrossbarConfig, deterministic, is_random
from ..io.pool import open_pool
from ..loading.model import LoadedModel, digests
from ..methods.merge import Merge
from ..runs.folder import RunResults
from ..runs.options import FuseOptions, OnArrays
from ..runs.run import HardwareSetup, run
from ..runs.setup import Setup
from ..training.mesh import on_mesh
from ..training.method import Frozen, Params
from .chip_file import STEP_CHIPS, Chips, Loaded, aged, load_chips
from .chips import CALIBRATION_ROWS, calibrate, redrawn
from .program import Restored, program
from .restore import load_restored


@overload
def fuse(options: FuseOptions, task: None = None) -> RunResults: ...


@overload
def fuse(options: FuseOptions, task: Sequence[str]) -> list[RunResults]: ...


def fuse(
    options: FuseOptions, task: Sequence[str] | None = None
) -> RunResults | list[RunResults]:
    """Do the run that the options describe, and return its results.

    Several tasks, instead of that of the options, are trained by one program, and each has a run and results.

    Raises:
      ValueError: before anything is written, on options or files that cannot be used.
    """
    if isinstance(task, str):
        raise ValueError(f"task is the text {task!r}: give a list of tasks")
    set_up = None if options.arrays.crossbar is None else on_arrays
    if task is None:
        return run([options], set_up)[0]
    return run([dataclasses.replace(options, task=source) for source in task], set_up)


def check(setup: Setup, options: FuseOptions) -> None:
    """Raise ValueError for a run that leaves no frozen model to program, or has no rows to calibrate ADCs on."""
    method = options.entry
    if "base" in method.groups or method.answers == "nothing":
        raise ValueError(
            f"the method {options.method} leaves no frozen model to program: leave out --crossbar"
        )
    if not len(setup.train):
        raise ValueError(
            f"{setup.task.name} has no training rows to calibrate on: set some apart (--train-rows)"
        )


def on_arrays(setup: Setup, options: FuseOptions, params: Params) -> HardwareSetup:
    """Return the setups of a run for training and for evaluation on its calibrated chip.

    Raises:
      ValueError: chips with other weights, a missing chip, an age without a drift model, or fresh noise where nothing
        is random.
    """
    check(setup, options)
    arrays = options.arrays
    setup, chips, config, restored = _chips(setup, arrays, options.control)
    if arrays.train_chip in ("fresh", "both") and not is_random(config):
        raise ValueError(
            f"programming is not random in {chips.name}: train with --train-chip chip, or none"
        )
    if arrays.restore is not None and arrays.train_chip in ("fresh", "both"):
        raise ValueError(
            f"{arrays.restore} corrects chip {arrays.chip} alone: train with --train-chip chip, or none"
        )
    setup = without_merged_pool(setup).with_layers(unroll=False)
    graph = setup.problem.graph
    digital = setup.problem.frozen

    def calibrated(config: CrossbarConfig, restored: Restored | None) -> Frozen:
        numbers = module_numbers(setup, options, chips)
        key = chips.chip_key(arrays.chip)
        chip = program(
            graph,
            digital,
            chips.rules(config),
            key,
            modules=numbers,
            norm=arrays.norm,
            restored=restored,
        )
        return on_mesh(
            calibrate(setup, params, chip, rows=CALIBRATION_ROWS), setup.config
        )

    chip = calibrated(config, restored)
    training = chip
    if arrays.train_chip == "none":
        training = calibrated(deterministic(config), None)
    elif arrays.train_chip != "chip":
        key = jax.random.fold_in(chips.key, STEP_CHIPS)
        steps = "every" if arrays.train_chip == "fresh" else "other"
        training = redrawn(
            chip, digital, chips.rules(config), key, steps=steps, norm=arrays.norm
        )
        training = on_mesh(training, setup.config)

    def tested(trained: Params) -> Setup:
        # Again, because the trained parameters change the inputs of the converters.
        return setup.with_problem(
            frozen=calibrate(setup, trained, chip, rows=CALIBRATION_ROWS)
        )

    return HardwareSetup(setup.with_problem(frozen=training), tested)


def restored_base(loaded: LoadedModel, arrays: OnArrays) -> Frozen:
    """Return a base without a pool on a restored chip, whose converters' ranges are those of the corrections."""
    loaded, chips, config, restored = _chips(loaded, arrays)
    problem = loaded.with_layers(unroll=False).problem
    key = chips.chip_key(arrays.chip)
    return program(
        problem.graph, problem.frozen, chips.rules(config), key, restored=restored
    )


def _chips(
    loaded: Loaded, arrays: OnArrays, control: str = "none"
) -> tuple[Loaded, Chips, CrossbarConfig, Restored | None]:
    """Return the model with its preparations, the chips that a run names, and their configuration and corrections."""
    assert arrays.crossbar is not None
    chips = load_chips(
        arrays.crossbar, key=arrays.chip_key, digital=arrays.keep_digital
    )
    loaded = chips.checked(loaded, control)
    config = aged(chips.config, arrays.age)
    restored = None
    if arrays.restore is not None:
        (restored,) = load_restored(
            arrays.restore, chips, [arrays.chip], digests(loaded)["base"]
        )
    return loaded, chips, config, restored


def module_numbers(
    setup: Setup, options: FuseOptions, chips: Chips
) -> Int[Array, " P"] | None:
    """Return the numbers of the setup's modules on the chips; None without a pool, and for a shared basis."""
    pool = setup.problem.frozen.pool
    if not isinstance(pool, LoraPool) or options.pool is None:
        return None
    names = list(
        open_pool(options.pool).names if chips.file is None else chips.file["modules"]
    )
    # A control is in the arrays of the module that it replaces, and its name ends with the name of that module.
    prefix = "" if options.control == "none" else f"{options.control} "
    return jnp.array(
        [names.index(name.removeprefix(prefix)) for name in pool.names], jnp.int32
    )


def without_merged_pool(setup: Setup) -> Setup:
    """Return the setup without the modules of a merge, because only the merged module is read."""
    problem = setup.problem
    if isinstance(problem.method, Merge) and problem.method.kind != "cat":
        return setup.with_problem(
            frozen=dataclasses.replace(problem.frozen, pool=None, gram=None)
        )
    return setup
