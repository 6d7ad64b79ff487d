"""`lorafusion fuse`: set up, train, evaluate, and write a run that can be killed and resumed at any time."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..io.digests import Digests
from ..io.hf import Base, open_base
from ..loading.model import check_digests, digests
from ..methods.fusion import choice_of
from ..support import processes
from ..support.platform import cores, make_room
from ..support.version import __version__
from ..tasks import Task
from ..training.fit import start
from ..training.mesh import make_mesh
from ..training.method import Params
from .evaluate import Evaluation, evaluate_seeds, seed_rows
from .folder import (
    Environment,
    Folders,
    RunConfig,
    RunFolder,
    RunResults,
    note,
    run_path,
)
from .options import FuseOptions, options_to_json
from .setup import Setup, load_setup, trainable_count, unrolls
from .start import (
    check_targets,
    stages,
    start_params,
    with_ranked_modules,
    with_targets,
)
from .train import train
from .weight_list import with_listed_modules

# Options that may differ between a run and its resumption.
_FREE_TO_CHANGE = (
    *("resume", "overwrite", "save_seconds", "out", "name", "eval_batch"),
    *("mesh", "distributed"),
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers")


class HardwareSetup(NamedTuple):
    """A run on hardware."""

    training: Setup  # setup of the training
    tested: Callable[
        [Params], Setup
    ]  # function from the trained parameters to the setup of the evaluation


# Puts a run on hardware: (digital setup, options, parameters to start from).
SetUpHardware = Callable[[Setup, FuseOptions, Params], HardwareSetup]


def run(options: FuseOptions, set_up: SetUpHardware | None = None) -> RunResults:
    """Do a run, and return its results.

    `set_up` puts the run on the hardware of its options; without it the run is digital. Options or files that cannot be
    used are a ValueError before anything is written.
    """
    options = with_listed_modules(options)
    options.check()
    base = open_base(options.base)
    make_room()
    if options.distributed:
        processes.join()
    with contextlib.ExitStack() as stack:
        if options.mesh is not None:
            stack.enter_context(
                jax.set_mesh(make_mesh(options.mesh, len(options.seeds)))
            )
        options = with_targets(options, base)
        previous = RunFolder(run_path(options))
        if options.overwrite and previous.exists():
            return _replace(previous, options, base, set_up)
        return _run(options, base, set_up)


def _replace(
    previous: RunFolder,
    options: FuseOptions,
    base: Base,
    set_up: SetUpHardware | None,
) -> RunResults:
    """Do a run under a temporary name, and replace a previous run once it is complete."""
    previous.config()  # raises FileError for a folder that is not a run
    folder = previous.folder
    complete = RunFolder(folder.with_name(f".{folder.name}.new"))
    replaced = folder.with_name(f".{folder.name}.replaced")
    if not options.resume:
        shutil.rmtree(complete.folder, ignore_errors=True)
    with previous.locked():
        temporary = dataclasses.replace(
            options, out=folder.parent, name=complete.folder.name
        )
        results = _run(temporary, base, set_up)
        complete.write_config({**complete.config(), "options": options})
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        complete.folder.rename(folder)
        shutil.rmtree(replaced)
    return results


def _run(options: FuseOptions, base: Base, set_up: SetUpHardware | None) -> RunResults:
    options.entry.check()
    run = RunFolder(run_path(options))
    if not options.resume and processes.first():
        _refuse_begun(run)
    recorded = _recorded(run, options) if options.resume and run.exists() else None
    if recorded is not None and (done := run.results()) is not None:
        note(f"{run.folder} is complete: nothing to resume")
        return done
    *before, last = stages(options)
    for stage in before:
        check_targets(last, base)
        _run(stage, base, set_up)
    setup = load_setup(
        last,
        seed_mode=recorded["environment"]["seed_mode"] if recorded else None,
        base=base,
    )
    if setup.task.one_list:
        note(_division(setup.task, last))
    if choice_of(options.recipe) != "draw":
        setup = with_ranked_modules(setup, options, recorded)
    current_digests = digests(setup)
    begin, left_out = start_params(setup, last, current_digests)
    unroll = set_up is None and unrolls(setup, last)
    if recorded is not None:
        unroll = recorded["environment"].get("unroll", setup.config.unroll)
    config = _config(options, setup, current_digests, unroll)
    if recorded is not None:
        _compare_environment(recorded, config)
        check_digests(run.folder, recorded["digests"], current_digests, options)
    hardware = HardwareSetup(setup.with_layers(unroll=unroll), lambda params: setup)
    if set_up is not None:
        hardware = set_up(
            setup, last, begin or start(setup.problem, options.seeds).params
        )
    processes.any_of(True)  # every process has read the files of an earlier attempt
    with run.locked():
        if recorded is None:
            if processes.first():
                _refuse_begun(
                    run
                )  # again: another run may have begun it while this one was loading
            run.write_config(config)
        return _complete(run, hardware, last, config, begin, left_out)


def _division(task: Task, options: FuseOptions) -> str:
    """Return a sentence on how one list was divided into training and test rows."""
    training_rows = min(len(task.train), options.train_rows)
    sentence = (
        f"{options.task} has no test part: {training_rows} of its {len(task.train) + len(task.test)} rows are used for "
        f"training, {len(task.test[: options.test_rows])} for testing"
    )
    return (
        sentence
        if options.test_rows == 0
        else f"{sentence} (--test-rows 0 trains on all)"
    )


def _refuse_begun(run: RunFolder) -> None:
    if run.exists():
        raise ValueError(
            f"{run.folder} holds a run: give this one another --name, continue that one with --resume, or replace it "
            "with --overwrite"
        )


def _complete(
    run: RunFolder,
    hardware: HardwareSetup,
    options: FuseOptions,
    config: RunConfig,
    begin: dict[str, Any] | None,
    left_out: Sequence[dict[str, Any]],
) -> RunResults:
    setup = hardware.training
    params, steps, seconds = train(run, setup, options, begin)
    trained = time.perf_counter()
    seeds, evaluation = evaluate_seeds(hardware.tested(params), options, params)
    evaluated = time.perf_counter()
    run.write_predictions(_prediction_rows(setup, seeds, evaluation))
    counts = trainable_count(setup) if options.entry.groups else {}
    tested = "".join(row.row for row in setup.task.test[: len(setup.test)])
    matches = evaluation.exact_match
    spread = None
    if matches is not None and len(seeds) > 1:
        spread = float(np.std(matches, ddof=1))
    results = RunResults(
        task=setup.task.name,
        method=options.method,
        control=options.control,
        trainable=sum(counts.values()),
        trainable_by_group=counts,
        exact_match=None if matches is None else float(np.mean(matches)),
        exact_match_std=spread,
        seeds=[
            row
            | {"steps": steps[i], "modules": list(setup.modules[i])}
            | rows_passed(setup, options, steps[i])
            | left_out[i]
            for i, row in enumerate(seed_rows(seeds, evaluation))
        ],
        test_rows=len(setup.test),
        test_sha256=hashlib.sha256(tested.encode()).hexdigest(),
        seconds={"train": seconds, "evaluate": evaluated - trained},
        environment=config["environment"],
    )
    run.write_results(results)
    return results


def rows_passed(setup: Setup, options: FuseOptions, steps: int) -> dict[str, int]:
    """Return the number of rows that one seed passed forward and backward to adapt, validation included."""
    method = options.entry
    recipe = options.recipe
    if setup.split is None or method.learns == "given":
        return {"forward_rows": 0, "backward_rows": 0}
    train = setup.split.train.shape[1]
    validation = setup.split.validation.shape[1]
    if method.search is not None:
        return {
            "forward_rows": method.evaluations(recipe, setup.problem.index.shape[1])
            * train,
            "backward_rows": 0,
        }
    epochs = steps // -(-train // min(recipe.batch_size, train))
    backward = (epochs if choice_of(recipe) == "draw" else epochs + 1) * train
    return {"forward_rows": backward + epochs * validation, "backward_rows": backward}


def _prediction_rows(
    setup: Setup, seeds: tuple[int, ...], evaluation: Evaluation
) -> Iterator[dict[str, Any]]:
    options = evaluation.option_correct
    for s, seed in enumerate(seeds):
        for i, prediction in enumerate(evaluation.predictions[s]):
            example = setup.task.test[i]
            yield {
                "seed": seed,
                "row": i,
                "input": example.input,
                "target": example.target,
                "prediction": prediction,
                "correct": bool(evaluation.correct[s, i]),
                "option_correct": None if options is None else bool(options[s, i]),
            }


def _config(
    options: FuseOptions, setup: Setup, current_digests: Digests, unroll: bool
) -> RunConfig:
    trained = (
        [] if setup.split is None else np.unique(np.concatenate(setup.split, axis=None))
    )
    folders = Folders()
    for name in ("base", "pool", "task"):
        option_value = getattr(options, name)
        if (
            option_value
            and not Path(option_value).expanduser().is_absolute()
            and Path(option_value).exists()
        ):
            folders[name] = os.path.abspath(option_value)
    return {
        "options": options,
        "modules": [list(modules) for modules in setup.modules],
        "task_sha256": setup.task.sha256,
        "trained_sha256": sorted({setup.task.train[i].input_sha256 for i in trained}),
        "max_new_tokens": setup.max_new_tokens,
        "environment": Environment(
            seed_mode=setup.problem.seed_mode,
            unroll=unroll,
            dtype=options.dtype,
            **environment(),
        ),
        "digests": current_digests,
        "folders": folders,
    }


def environment() -> dict[str, Any]:
    """Return device, number of cores and versions of packages."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": cores(),
        "versions": {"lorafusion-jax": __version__}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _recorded(run: RunFolder, options: FuseOptions) -> RunConfig:
    """Return the config of the run to resume; ValueError if it was begun with other options."""
    config = run.config()
    was = _flat(**options_to_json(config["options"]))
    current = _flat(**options_to_json(options))
    different = [
        k for k in current if k not in _FREE_TO_CHANGE and current[k] != was.get(k)
    ]
    if different:
        changes = "; ".join(
            f"{k} was {was.get(k)!r}, now {current[k]!r}" for k in different
        )
        raise ValueError(
            f"{run.folder} was begun with other options: {changes}. Resume it with the same"
        )
    return config


def _flat(
    recipe: dict[str, Any], arrays: dict[str, Any], **others: Any
) -> dict[str, Any]:
    return others | recipe | arrays


def _compare_environment(recorded: RunConfig, current: RunConfig) -> None:
    for key in ("modules", "task_sha256"):
        if recorded[key] != current[key]:
            raise ValueError(
                f"the {key} changed since the run was begun: restore them, or begin another run"
            )
    was = recorded["environment"]
    is_ = current["environment"]
    if different := [key for key in was if was[key] != is_[key]]:
        changes = "; ".join(f"{key} was {was[key]}, is {is_[key]}" for key in different)
        note(f"note: {changes}; the last bits may differ from an uninterrupted run")
