"""`lorafusion fuse`: prepare, train, evaluate, and write a run that can be killed and resumed at any time."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import __version__
from ..io import checkpoint, processes
from ..io.hf import read_config
from ..hardware.calibration import calibrate
from ..hardware.setup import CALIBRATION_ROWS, on_arrays
from .evaluate import Evaluation, seed_rows
from ..training.fit import Epoch, fit, start
from .options import GIVEN, UNTRAINED, FuseOptions, OnArrays, Recipe
from ..training.programs import make_room
from .ranking import choose_by_gradient
from .folder import RunFolder
from .scoring import evaluate_seeds
from ..methods.search.cma import check_population, load_evosax
from ..methods.search.lorahub import check_evaluations, load_nevergrad
from ..methods.search.run import SEARCHES, evaluations
from .prepare import Setup, check, prepare, trainable_count, with_modules
from ..training.mesh import make_mesh, on_mesh, to_host
from ..training.step import TrainState

# What may differ between a run and its resumption.
_FREE_TO_CHANGE = ("resume", "log", "save_seconds", "out", "name", "mesh", "distributed")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers")


def fuse(options: FuseOptions) -> dict[str, Any]:
    """Run what the options ask for, and return the results as they are in results.json.

    Raises:
      ValueError: before anything is written, on options or files that cannot be used.
    """
    check(options)
    options = with_targets(options)
    make_room()
    with contextlib.ExitStack() as stack:
        if options.distributed:
            stack.enter_context(processes.joined())
        if options.mesh is not None:
            stack.enter_context(jax.set_mesh(make_mesh(options.mesh, len(options.seeds))))
        return _fuse(options)


def with_targets(options: FuseOptions) -> FuseOptions:
    """Return the options as a run records them: with the family's own targets where none are given."""
    if options.recipe.lora_targets is not None:
        return options
    targets = read_config(options.base).targets
    return dataclasses.replace(options, recipe=dataclasses.replace(options.recipe, lora_targets=targets))


def _fuse(options: FuseOptions) -> dict[str, Any]:
    if options.method == "lorahub":
        load_nevergrad()
    if options.method == "cma":
        check_population(options.recipe.generations, options.recipe.population)
        load_evosax()
    if options.log:
        _load_wandb()
    run = RunFolder(run_path(options))
    if not options.resume:
        _refuse_begun(run)
    recorded = _recorded(run, options) if options.resume and run.exists() else None
    if recorded is not None and (done := run.results()) is not None:
        _note(f"{run.folder} is complete: nothing to resume")
        return done
    setup = prepare(options, path=recorded["environment"]["path"] if recorded else None)
    if options.method == "lorahub":
        check_evaluations(options.recipe.evaluations, setup.index.shape[1])
    if options.recipe.choose == "gradient":
        setup = _chosen(setup, options, recorded)
    begin = _start_params(setup, options)
    config = _config(options, setup)
    training = tested = setup
    if options.arrays.crossbar is not None:
        training, tested = on_arrays(setup, options, begin or start(setup, options.seeds).params)
    processes.barrier("every process has read what is there")
    with run.locked():
        if recorded is None:
            if processes.first():
                _refuse_begun(run)  # again: another run may have begun it while this one was loading
            run.write_config(config)
        else:
            _compare_environment(recorded, config)
        return _complete(run, training, tested, options, config, begin)


def _chosen(setup: Setup, options: FuseOptions, recorded: dict[str, Any] | None) -> Setup:
    """Return the setup with the modules of the run that is resumed, else with those of the greatest descent."""
    if recorded is not None:
        return with_modules(setup, options, recorded)
    recipe = options.recipe
    return choose_by_gradient(setup, options.seeds, keep=recipe.modules, batch_size=recipe.batch_size)


def _refuse_begun(run: RunFolder) -> None:
    if run.exists():
        raise ValueError(
            f"{run.folder} holds a run: give this one another --name, or go on with that one with --resume"
        )


def run_path(options: FuseOptions) -> Path:
    """Return the folder of the run: OUT/NAME, by default OUT/TASK-METHOD."""
    task = Path(options.task.partition(":")[0])
    return options.out / (options.name or f"{task.stem}-{options.method}")


def load_run(folder: Path) -> tuple[FuseOptions, dict[str, Any], dict[str, Any]]:
    """Return the options, the trained numbers (leaves with an axis of seeds) and the config of a run.

    Raises:
      ValueError: the folder is no run, or its training has not ended.
    """
    run = RunFolder(folder)
    config = run.config()
    options = options_from_json(config["options"])
    if options.method in UNTRAINED:
        return options, {}, config
    final = run.checkpoints / "final"
    if not final.is_dir():
        raise ValueError(f"{folder} has not been trained to its end: resume it with --resume")
    params, _ = checkpoint.load(final)
    return options, jax.tree.map(jnp.asarray, params), config


def _complete(
    run: RunFolder,
    setup: Setup,
    tested: Setup,
    options: FuseOptions,
    config: dict[str, Any],
    begin: dict[str, Any] | None,
) -> dict[str, Any]:
    began = time.perf_counter()
    params, steps = _train(run, setup, options, begin)
    trained = time.perf_counter()
    if options.arrays.crossbar is not None:  # on what the trained numbers bring to the converters
        frozen = calibrate(tested, params, tested.frozen, rows=CALIBRATION_ROWS)
        tested = dataclasses.replace(tested, frozen=frozen)
    seeds, evaluation = evaluate_seeds(tested, options, params)
    evaluated = time.perf_counter()
    run.write_predictions(_prediction_rows(setup, seeds, evaluation))
    counts = {} if options.method in UNTRAINED | GIVEN | {"single"} else trainable_count(setup)
    results = {
        "task": setup.task.name,
        "method": options.method,
        "control": options.control,
        "trainable": sum(counts.values()),
        "trainable_by_group": counts,
        "exact_match": float(np.mean(evaluation.exact_match)),
        "exact_match_std": float(np.std(evaluation.exact_match, ddof=1)) if len(seeds) > 1 else None,
        "seeds": [
            row
            | {"steps": steps[i], "modules": list(setup.modules[i])}
            | dict(zip(("forward_rows", "backward_rows"), rows_passed(setup, options, steps[i]), strict=True))
            for i, row in enumerate(seed_rows(seeds, evaluation))
        ],
        "test_rows": len(setup.test),
        "seconds": {"train": trained - began, "evaluate": evaluated - trained},
        "environment": config["environment"],
    }
    run.write_results(results)
    return results


def _train(
    run: RunFolder, setup: Setup, options: FuseOptions, begin: dict[str, Any] | None
) -> tuple[dict[str, Any], list[int]]:
    """Return the trained numbers and the steps that each seed took."""
    final = run.checkpoints / "final"
    if options.method in UNTRAINED:
        return {}, [0] * len(options.seeds)
    if final.is_dir():
        params, metadata = checkpoint.load(final)
        return on_mesh(jax.tree.map(jnp.asarray, params), setup.config, of_seeds=True), metadata["steps"]
    if options.method in GIVEN:
        params, steps = start(setup, options.seeds).params, [0] * len(options.seeds)
    elif options.method in SEARCHES:
        run.cut_metrics(0)  # a search is not resumed, but repeated
        params, taken = SEARCHES[options.method](run, setup, options)
        steps = [taken] * len(options.seeds)
    else:
        state = _fit(run, setup, options, begin)
        params = state.best if options.recipe.stop_early else state.params
        steps = to_host(state.step).tolist()
    checkpoint.save(final, to_host(params), {"steps": steps})
    return on_mesh(params, setup.config, of_seeds=True), steps


def _fit(run: RunFolder, setup: Setup, options: FuseOptions, begin: dict[str, Any] | None) -> TrainState:
    state, done, step = start(setup, options.seeds, begin), 0, 0
    saved = checkpoint.latest(run.checkpoints)
    if saved is not None:
        state, metadata = checkpoint.load(saved, state)
        state = on_mesh(jax.tree.map(jnp.asarray, state), setup.config, of_seeds=True)
        done, step = metadata["epochs"], metadata["step"]
    run.cut_metrics(step)
    log = _weights_and_biases(run, options) if options.log and processes.first() else None
    last_save = time.monotonic()

    def after_epoch(epoch: Epoch) -> None:
        nonlocal last_save
        rows = list(_metric_rows(epoch, options.seeds))
        run.append_metrics(rows)
        if log is not None:
            _log(log, epoch, options.seeds)
        if epoch.last or time.monotonic() - last_save >= options.save_seconds:
            step = rows[-1]["step"]
            metadata = {"epochs": epoch.number, "step": step}
            checkpoint.save_step(run.checkpoints, step, epoch.state, metadata, keep=2)
            last_save = time.monotonic()

    if not np.all(to_host(state.stopped)):
        state = fit(setup, state, options.recipe, options.seeds, epochs_done=done, after_epoch=after_epoch)
    if log is not None:
        log.finish()
    return state


def _start_params(setup: Setup, options: FuseOptions) -> dict[str, Any] | None:
    """Return the numbers of the run to start from, if they fit this one."""
    if options.start_from is None:
        return None
    other, params, config = load_run(options.start_from)
    wanted = {"seeds": list(options.seeds), "modules": [list(m) for m in setup.modules]}
    got = {"seeds": list(other.seeds), "modules": config["modules"]}
    if wanted != got:
        raise ValueError(
            f"{options.start_from} fused other modules or seeds ({got['seeds']}, wanted {wanted['seeds']}): "
            "give the same --seeds, --pool, --modules"
        )
    fresh = start(setup, options.seeds).params
    if jax.tree.map(jnp.shape, fresh) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            f"{options.start_from} was trained with the method {other.method} and other shapes "
            f"({', '.join(params)}): give the same --method and --granularity"
        )
    return params


def _metric_rows(epoch: Epoch, seeds: tuple[int, ...]) -> Any:
    steps = len(next(iter(epoch.metrics.values())))
    for i in range(steps):
        for s, seed in enumerate(seeds):
            values = {name: value[i, s].item() for name, value in epoch.metrics.items()}
            yield {"step": epoch.first_step + i + 1, "epoch": epoch.number, "seed": seed, **values}
    for s, seed in enumerate(seeds):
        yield {
            "step": epoch.first_step + steps,
            "epoch": epoch.number,
            "seed": seed,
            "validation_loss": epoch.validation_loss[s].item(),
            "stopped": epoch.stopped[s].item(),
        }


def rows_passed(setup: Setup, options: FuseOptions, steps: int) -> tuple[int, int]:
    """Return how many rows one seed passed forward and backward through the model to adapt, validation included."""
    if setup.split is None or options.method in GIVEN:
        return 0, 0
    recipe = options.recipe
    train, validation = setup.split.train.shape[1], setup.split.validation.shape[1]
    if options.method in SEARCHES:
        return evaluations(options, setup) * train, 0
    epochs = steps // -(-train // min(recipe.batch_size, train))
    ranking = train if recipe.choose == "gradient" else 0
    return epochs * (train + validation) + ranking, epochs * train + ranking


def _prediction_rows(setup: Setup, seeds: tuple[int, ...], evaluation: Evaluation) -> Any:
    options = evaluation.option_correct
    for s, seed in enumerate(seeds):
        for i, said in enumerate(evaluation.predictions[s]):
            example = setup.task.test[i]
            yield {
                "seed": seed,
                "row": i,
                "input": example.input,
                "target": example.target,
                "prediction": said,
                "correct": bool(evaluation.correct[s, i]),
                "option_correct": None if options is None else bool(options[s, i]),
            }


def _config(options: FuseOptions, setup: Setup) -> dict[str, Any]:
    return {
        "options": options_to_json(options),
        "modules": [list(modules) for modules in setup.modules],
        "task_sha256": setup.task.sha256,
        "max_new_tokens": setup.max_new_tokens,
        "environment": {"path": setup.path, "dtype": options.dtype, **environment()},
    }


def environment() -> dict[str, Any]:
    """Return the device, the cores and the versions that a result was made with."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"lorafusion-jax": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def options_to_json(options: FuseOptions) -> dict[str, Any]:
    """Return the options as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


def options_from_json(values: dict[str, Any]) -> FuseOptions:
    """Return the options again; what was not known yet when they were written has its default."""
    restored: dict[str, Any] = _with_tuples(values) | {"recipe": Recipe(**_with_tuples(values["recipe"]))}
    restored["arrays"] = OnArrays(**_with_tuples(values.get("arrays", {})))
    restored |= {name: Path(restored[name]) for name in ("out", "start_from") if restored.get(name)}
    return FuseOptions(**restored)


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _recorded(run: RunFolder, options: FuseOptions) -> dict[str, Any]:
    """Return the config of the run to resume, if it was asked for the same."""
    config = run.config()
    was, now = (_flat(options_to_json(o)) for o in (options_from_json(config["options"]), options))
    different = [k for k in now if k not in _FREE_TO_CHANGE and now[k] != was.get(k)]
    if different:
        changes = "; ".join(f"{k} was {was.get(k)!r}, now {now[k]!r}" for k in different)
        raise ValueError(f"{run.folder} was begun with other options: {changes}. Resume it with the same")
    return config


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    groups = ("recipe", "arrays")
    flat = {name: value for name, value in options.items() if name not in groups}
    return flat | {name: value for group in groups for name, value in options[group].items()}


def _compare_environment(recorded: dict[str, Any], now: dict[str, Any]) -> None:
    for key in ("modules", "task_sha256"):
        if recorded[key] != now[key]:
            raise ValueError(f"the run cannot be resumed: the {key} are not those it was begun with")
    was, is_ = recorded["environment"], now["environment"]
    if different := [key for key in is_ if was[key] != is_[key]]:
        changes = "; ".join(f"{key} was {was[key]}, is {is_[key]}" for key in different)
        _note(f"note: {changes}; the last bits may differ from an uninterrupted run")


def _note(text: str) -> None:
    if processes.first():
        print(text, file=sys.stderr)


def _load_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "--log writes to Weights & Biases, which is not installed: pip install 'lorafusion-jax[wandb]'"
        ) from None
    return wandb


def _weights_and_biases(run: RunFolder, options: FuseOptions) -> Any:
    config = options_to_json(options)
    return _load_wandb().init(project="lorafusion-jax", name=run.folder.name, dir=run.folder, config=config)


def _log(log: Any, epoch: Epoch, seeds: tuple[int, ...]) -> None:
    steps = len(next(iter(epoch.metrics.values())))
    for i in range(steps):
        values = {
            f"{name}/seed {seed}": value[i, s].item()
            for name, value in epoch.metrics.items()
            for s, seed in enumerate(seeds)
        }
        if i == steps - 1:
            losses = zip(seeds, epoch.validation_loss, strict=True)
            values |= {f"validation_loss/seed {seed}": loss.item() for seed, loss in losses}
        log.log(values, step=epoch.first_step + i + 1)
