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
from ..support.checks import flags_given
from ..support.platform import cores, make_room
from ..support.version import __version__
from ..tasks import Task
from ..training.fit import start
from ..training.mesh import make_mesh, to_host
from ..training.method import Params
from .evaluate import Evaluation, evaluate_seeds, seed_rows
from .folder import (
    Environment,
    FinalSteps,
    Folders,
    RunConfig,
    RunFolder,
    RunResults,
    note,
    run_path,
)
from .options import FuseOptions, options_to_json
from .setup import Setup, load_setup, of_all_tasks, trainable_count, unrolls
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


def run(
    tasks: Sequence[FuseOptions], set_up: SetUpHardware | None = None
) -> list[RunResults]:
    """Do the runs of some options, which differ in their tasks alone and train as one program; return their results.

    `set_up` puts a run on the hardware of its options; without it runs are digital. Options or files that cannot be
    used are a ValueError before anything is written.
    """
    tasks = [with_listed_modules(options) for options in tasks]
    for options in tasks:
        options.check()
    check_together(tasks)
    options = tasks[0]
    base = open_base(options.base)
    make_room()
    if options.distributed:
        processes.join()
    with contextlib.ExitStack() as stack:
        if options.mesh is not None:
            stack.enter_context(
                jax.set_mesh(make_mesh(options.mesh, len(options.seeds)))
            )
        tasks = [with_targets(options, base) for options in tasks]
        previous = RunFolder(run_path(options))
        if options.overwrite and previous.exists():
            return _replace(previous, tasks[0], base, set_up)
        return _run(tasks, base, set_up)


def check_together(tasks: Sequence[FuseOptions]) -> None:
    """Raise ValueError for no task, or for several that cannot be trained as one program."""
    if not tasks:
        raise ValueError("no tasks: give at least one with --task")
    if len(tasks) == 1:
        return
    options = tasks[0]
    of_one_task = [
        flags_given(options, ("name", "overwrite", "distributed")),
        flags_given(options.arrays, ("crossbar",)),
    ]
    if options.entry.learns in ("searched", "untrained"):
        of_one_task.append(f"--method {options.method}")
    if flags := ", ".join(filter(None, of_one_task)):
        raise ValueError(
            f"{flags}: only for one task: leave it out, or start a run for each --task"
        )
    folders = [run_path(each) for each in tasks]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ValueError(
            f"two tasks have the name of the run {twice[0]}: rename one of them"
        )


def _replace(
    previous: RunFolder,
    options: FuseOptions,
    base: Base,
    set_up: SetUpHardware | None,
) -> list[RunResults]:
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
        results = _run([temporary], base, set_up)
        complete.write_config({**complete.config(), "options": options})
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        complete.folder.rename(folder)
        shutil.rmtree(replaced)
    return results


def _run(
    tasks: Sequence[FuseOptions], base: Base, set_up: SetUpHardware | None
) -> list[RunResults]:
    tasks[0].entry.check()
    done: dict[Path, RunResults] = {}
    incomplete: dict[Path, RunConfig | None] = {}
    for options in tasks:
        run = RunFolder(run_path(options))
        if not options.resume and processes.first():
            _refuse_begun(run)
        begun = options.resume and run.exists()
        recorded = _recorded(run, options) if begun else None
        results = run.results() if begun else None
        if results is None:
            incomplete[run.folder] = recorded
        else:
            note(f"{run.folder} is complete: nothing to resume")
            done[run.folder] = results
    # Runs that were begun continue without new ones, with which they would have to start again.
    for is_begun in (True, False):
        left = [
            options
            for options in tasks
            if (folder := run_path(options)) in incomplete
            and (incomplete[folder] is not None) == is_begun
        ]
        if left:
            recorded_of_left = [incomplete[run_path(options)] for options in left]
            all_results = _complete(left, recorded_of_left, base, set_up)
            done |= zip(map(run_path, left), all_results, strict=True)
    return [done[run_path(options)] for options in tasks]


def _complete(
    tasks: Sequence[FuseOptions],
    recorded: Sequence[RunConfig | None],
    base: Base,
    set_up: SetUpHardware | None,
) -> list[RunResults]:
    """Train and evaluate runs, of which those that were begun have a recorded configuration."""
    runs = [RunFolder(run_path(options)) for options in tasks]
    *before, last = zip(*map(stages, tasks), strict=True)
    for stage in before:
        check_targets(last[0], base)
        # A search is of one task.
        together = stage[0].entry.learns == "trained"
        for part in [stage] if together else [[options] for options in stage]:
            _run(part, base, set_up)
    environments = [config["environment"] for config in recorded if config is not None]
    seed_mode = environments[0]["seed_mode"] if environments else None
    setups: list[Setup] = []
    for options in last:
        like = setups[0] if setups else None
        setup = load_setup(options, seed_mode, base=base, like=like)
        setups.append(setup)
        if setup.task.one_list:
            note(_division(setup.task, options))
    if choice_of(tasks[0].recipe) != "draw":
        setups = [
            with_ranked_modules(*of_task)
            for of_task in zip(setups, tasks, recorded, strict=True)
        ]
    starts = [
        start_params(setup, options, digests(setup))
        for setup, options in zip(setups, last, strict=True)
    ]
    begin = starts[0][0]
    if len(runs) > 1:
        begins = [to_host(params) for params, _ in starts]
        begin = jax.tree.map(lambda *parts: np.concatenate(parts), *begins)
    together = of_all_tasks(setups)
    all_seeds = dataclasses.replace(last[0], seeds=last[0].seeds * len(runs))
    unroll = set_up is None and unrolls(together, all_seeds)
    if environments:
        unroll = environments[0].get("unroll", together.config.unroll)
    configs = []
    for run, options, setup, was in zip(runs, tasks, setups, recorded, strict=True):
        config = _config(options, setup, digests(setup), unroll)
        configs.append(config)
        if was is not None:
            _compare_environment(run, was, config)
            check_digests(run.folder, was["digests"], config["digests"], options)
    training = together.with_layers(unroll=unroll)
    hardware = [
        HardwareSetup(setup, lambda params, setup=setup: setup) for setup in setups
    ]
    if set_up is not None:
        first_params = begin or start(together.problem, last[0].seeds).params
        hardware = [set_up(together, last[0], first_params)]
        training = hardware[0].training
    processes.any_of(True)  # every process has read the files of an earlier attempt
    with contextlib.ExitStack() as locks:
        for run in runs:
            locks.enter_context(run.locked())
        for run, config, was in zip(runs, configs, recorded, strict=True):
            if was is None:
                if processes.first():
                    _refuse_begun(
                        run
                    )  # again: another run may have begun it while this one was loading
                run.write_config(config)
        trained = train(runs, training, all_seeds, begin)
        results = []
        failed = []
        for number, final in enumerate(trained):
            if final is None:
                failed.append(str(runs[number].folder))
                continue
            results.append(
                _evaluate(
                    runs[number],
                    hardware[number],
                    last[number],
                    configs[number],
                    final,
                    left_out=starts[number][1],
                )
            )
        if failed:
            raise ValueError(
                f"no seed had a finite loss at the end of {', '.join(failed)}: try each alone with another --name and "
                "lower learning rates, or float32 instead of bfloat16. --resume without them continues other tasks"
            )
        return results


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


def _evaluate(
    run: RunFolder,
    hardware: HardwareSetup,
    options: FuseOptions,
    config: RunConfig,
    trained: tuple[Params, FinalSteps],
    left_out: Sequence[dict[str, Any]],
) -> RunResults:
    """Evaluate a run's trained parameters, and write its results."""
    setup = hardware.training
    params, final = trained
    steps = final["steps"]
    began = time.perf_counter()
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
        seconds={
            "train": final.get("seconds", 0.0),
            "evaluate": evaluated - began,
        },
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


def _compare_environment(
    run: RunFolder, recorded: RunConfig, current: RunConfig
) -> None:
    for key in ("modules", "task_sha256"):
        if recorded[key] != current[key]:
            raise ValueError(
                f"the {key} changed since {run.folder} was begun: restore them, or begin another run"
            )
    was = recorded["environment"]
    is_ = current["environment"]
    if different := [key for key in was if was[key] != is_[key]]:
        changes = "; ".join(f"{key} was {was[key]}, is {is_[key]}" for key in different)
        note(f"note: {changes}; the last bits may differ from an uninterrupted run")
