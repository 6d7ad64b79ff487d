"""`lorafusion fuse`: prepare, train, evaluate, and write a run that can be killed and resumed at any time."""

import contextlib
import dataclasses
import importlib.metadata
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from .. import __version__, interrupts
from ..files import writing
from ..io import arrays, checkpoint, processes
from ..io.digests import Digests
from ..io.folders import stored_by_orbax
from ..io.hf import read_config
from ..io.source import is_hub_id
from ..methods import find
from ..methods.entry import SearchJob
from ..methods.fusion import choice_of
from ..methods.recipes import TargetedRecipe, basis_of, modules_of
from ..tasks import without_revision
from ..training.compiled import make_room
from ..training.fit import Epoch, fit, joined, start, whole_epochs
from ..training.mesh import make_mesh, on_mesh, to_host
from ..training.method import Params
from ..training.step import TrainState
from .evaluate import Evaluation, seed_rows
from .folder import Environment, Folders, RunConfig, RunFolder
from .options import FuseOptions
from .prepare import Setup, check, check_digests, digests, prepare, trainable_count, with_modules, with_whole_modules
from .ranking import choose_by_gradient
from .scoring import evaluate_seeds

# Options that may differ between a run and its resumption.
_FREE_TO_CHANGE = (
    *("resume", "log", "save_seconds", "profile", "out", "name"),
    *("mesh", "distributed", "coordinator", "processes", "process"),
)
# Steps without a finite loss in any seed after which training stops.
_BAD_STEPS = 20
_FINAL = "the trained numbers of a run"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers")


class HardwareSetup(NamedTuple):
    """A run on hardware.

    Attributes:
      training: what it trains on.
      tested: returns what it is evaluated on, made ready for the trained numbers.
    """

    training: Setup
    tested: Callable[[Params], Setup]


class _Steps(TypedDict):
    """Metadata of the trained numbers: steps that each seed took."""

    steps: list[int]


class _Reached(TypedDict):
    """Metadata of a state to go on from."""

    epochs: int
    step: int


# Puts a run on hardware: (digital setup, options, numbers to start from).
SetUpHardware = Callable[[Setup, FuseOptions, Params], HardwareSetup]


def run(options: FuseOptions, set_up: SetUpHardware | None = None) -> dict[str, Any]:
    """Run what the options ask for, and return the results as they are in results.json.

    Args:
      options: of the run.
      set_up: puts it on the hardware that the options name; None for a digital run.

    Raises:
      ValueError: before anything is written, on options or files that cannot be used.
    """
    check(options)
    if (options.arrays.crossbar is None) != (set_up is None):
        raise ValueError("options with a crossbar and what puts a run on it go together: use `lorafusion_jax.fuse`")
    options = with_targets(options)
    make_room()
    with contextlib.ExitStack() as stack:
        if options.distributed:
            stack.enter_context(processes.joined(options.coordinator, options.processes, options.process))
        if options.mesh is not None:
            stack.enter_context(jax.set_mesh(make_mesh(options.mesh, len(options.seeds))))
        return _run(options, set_up)


def with_targets(options: FuseOptions) -> FuseOptions:
    """Return the options as a run records them: with the family's own targets where none are given."""
    recipe = options.recipe
    if not isinstance(recipe, TargetedRecipe) or recipe.lora_targets is not None:
        return options
    targets = read_config(options.base).targets
    return dataclasses.replace(options, recipe=dataclasses.replace(recipe, lora_targets=targets))


def _run(options: FuseOptions, set_up: SetUpHardware | None) -> dict[str, Any]:
    find(options.method).check()
    if options.log:
        _load_wandb()
    run = RunFolder(run_path(options))
    if not options.resume:
        _refuse_begun(run)
    recorded = _recorded(run, options) if options.resume and run.exists() else None
    if recorded is not None and (done := run.results()) is not None:
        _note(f"{run.folder} is complete: nothing to resume")
        return dict(done)
    setup = prepare(options, seed_mode=recorded["environment"]["seed_mode"] if recorded else None)
    if choice_of(options.recipe) != "draw":
        setup = _chosen(setup, options, recorded)
    begin = _start_params(setup, options)
    found = digests(setup, options)
    config = _config(options, setup, found)
    hardware = HardwareSetup(setup, lambda params: setup)
    if set_up is not None:
        hardware = set_up(setup, options, begin or start(setup.problem, options.seeds).params)
    processes.barrier("every process has read what is there")
    with run.locked():
        if recorded is None:
            if processes.first():
                _refuse_begun(run)  # again: another run may have begun it while this one was loading
            run.write_config(config)
        else:
            _compare_environment(recorded, config)
            check_digests(run.folder, recorded.get("digests"), found, options)
        return _complete(run, hardware, options, config, begin)


def _chosen(setup: Setup, options: FuseOptions, recorded: RunConfig | None) -> Setup:
    """Return the setup with the modules of the run that is resumed, else with those of the greatest descent."""
    if recorded is not None:
        return with_modules(setup, options, recorded["modules"])
    recipe = options.recipe
    in_whole = basis_of(recipe) is not None and choice_of(recipe) == "gradient"
    ranked = with_whole_modules(setup, options) if in_whole else setup
    chosen = choose_by_gradient(ranked, options.seeds, keep=modules_of(recipe), batch_size=recipe.batch_size)
    return with_modules(setup, options, chosen.modules)


def _refuse_begun(run: RunFolder) -> None:
    if run.exists():
        raise ValueError(
            f"{run.folder} holds a run: give this one another --name, or go on with that one with --resume"
        )


def run_path(options: FuseOptions) -> Path:
    """Return the folder of the run: OUT/NAME, by default OUT/TASK-METHOD."""
    task = Path(without_revision(options.task).partition(":")[0])
    return Path(options.out) / (options.name or f"{task.stem}-{options.method}")


def load_run(folder: str | Path) -> tuple[FuseOptions, dict[str, Any], RunConfig]:
    """Return the options, the trained numbers (leaves with an axis of seeds) and the config of a run.

    Raises:
      ValueError: the folder is not a run, a file of it is damaged, or its training has not ended.
    """
    run = RunFolder(Path(folder))
    config = run.config()
    options = _located(Path(folder), config)
    if find(options.method).learns == "untrained":
        return options, {}, config
    if not run.final.is_dir():
        if (run.checkpoints / "final").is_dir():
            raise stored_by_orbax(run.checkpoints / "final", f"--run {folder}")
        raise ValueError(f"{folder} has not been trained to its end: resume it with --resume")
    params, _ = arrays.load(run.final, metadata=_Steps, what=_FINAL)
    return options, jax.tree.map(jnp.asarray, params), config


def _located(folder: Path, config: RunConfig) -> FuseOptions:
    """Return a run's options with absolute paths in place of relative ones."""
    options, folders = config["options"], config.get("folders")
    if folders is None and is_hub_id(options.base):
        _note(
            f"note: {folder} is of an older version, and there is no folder {options.base} here: its base is taken for "
            "one of the hub. If it was a folder, go to where its path leads there"
        )
    for name, path in (folders or {}).items():
        given = Path(getattr(options, name) or "").expanduser()
        # A project that was moved whole has its files only where the given paths lead from its new place.
        if not given.is_absolute() and (Path(str(path)).exists() or not given.exists()):
            options = dataclasses.replace(options, **{name: path})
    return options


def _complete(
    run: RunFolder,
    hardware: HardwareSetup,
    options: FuseOptions,
    config: RunConfig,
    begin: dict[str, Any] | None,
) -> dict[str, Any]:
    began = time.perf_counter()
    setup = hardware.training
    params, steps = _train(run, setup, options, begin)
    trained = time.perf_counter()
    seeds, evaluation = evaluate_seeds(hardware.tested(params), options, params)
    evaluated = time.perf_counter()
    run.write_predictions(_prediction_rows(setup, seeds, evaluation))
    counts = trainable_count(setup) if find(options.method).groups else {}
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
    method = find(options.method)
    if method.learns == "untrained":
        return {}, [0] * len(options.seeds)
    saved = arrays.load_sound(run.final, metadata=_Steps, what=_FINAL, note=_note)
    if saved is not None:
        params, metadata = saved
        return on_mesh(jax.tree.map(jnp.asarray, params), setup.config, of_seeds=True), metadata["steps"]
    if method.learns == "given":
        params, steps = start(setup.problem, options.seeds).params, [0] * len(options.seeds)
    elif method.search is not None:
        run.cut_metrics(0)  # a search is not resumed, but repeated
        of_all = (setup.problem, setup.rows, options.recipe, options.seeds, setup.modules)
        params, taken = method.search(SearchJob(*of_all, record=run.append_metrics))
        steps = [taken] * len(options.seeds)
    else:
        state = _fit(run, setup, options, begin)
        params = state.best if options.recipe.stop_early else state.params
        steps = to_host(state.step).tolist()
    arrays.save(run.final, to_host(params), {"steps": steps})
    return on_mesh(params, setup.config, of_seeds=True), steps


def _stop_trace() -> None:
    try:
        jax.profiler.stop_trace()
    except (OSError, RuntimeError) as error:  # training is worth more than the trace
        _note(f"the trace for --profile could not be written: {error}")


def _fit(run: RunFolder, setup: Setup, options: FuseOptions, begin: dict[str, Any] | None) -> TrainState:
    state, done, reached = start(setup.problem, options.seeds, begin), 0, 0
    steps = checkpoint.steps(run.checkpoints)
    saved = checkpoint.load_newest(steps, state, metadata=_Reached, note=_note)
    if saved is not None:
        state, metadata = saved
        state = on_mesh(jax.tree.map(jnp.asarray, state), setup.config, of_seeds=True)
        done, reached = metadata["epochs"], metadata["step"]
    if steps:
        _note(f"{run.folder}: going on from step {reached}")
    run.cut_metrics(reached)
    bad = _bad_steps_before(run, options.seeds, reached)  # steps since the last finite loss

    def check_losses() -> None:
        if np.min(bad) >= _BAD_STEPS:
            raise ValueError(
                f"no seed has had a finite loss for {np.min(bad)} steps, up to step {reached}: try lower "
                f"learning rates, or float32 if it was bfloat16. {run.folder} keeps the metrics, and in its last "
                "checkpoint the numbers of the best validation loss; give the next try another --name"
            )

    check_losses()  # of the run that is resumed

    log = _weights_and_biases(run, options) if options.log and processes.first() else None
    last_save = ended = time.monotonic()
    several = processes.several()
    by_epoch, taken = whole_epochs() or several, 0.0  # after which a signal stops, and the seconds of the last one
    # The next step takes the memory of a state. A copy of all weights and their momenta would be too much to keep.
    copied = None if several or "base" in find(options.method).groups else jax.jit(partial(jax.tree.map, jnp.copy))
    traced = min(done + 2, options.recipe.epochs) if options.profile else None
    tracing = contextlib.ExitStack()
    if options.profile:  # JAX would only find at the end of the epoch that it cannot write there
        with writing(options.profile):
            options.profile.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=options.profile):
                pass

    def before_epoch(number: int) -> None:
        if number == traced:
            jax.profiler.start_trace(str(options.profile), create_perfetto_trace=True)
            tracing.callback(_stop_trace)

    def save(epochs: int, step: int, state: TrainState) -> None:
        checkpoint.save_step(run.checkpoints, step, state, {"epochs": epochs, "step": step}, keep=2)

    def hold(second: Callable[[], None] | None = None) -> None:
        when = "epoch" if by_epoch else "step"
        saved = f"its state is saved in {run.folder}, and resuming goes on from it"
        interrupts.hold(f"after this {when} (the last one took {taken:.1f} s); {saved}", second)

    def after_interval(number: int, state: TrainState, metrics: Sequence[Mapping[str, Any]]) -> None:
        nonlocal taken, ended
        if not by_epoch:
            taken = time.monotonic() - ended
        hold()
        so_far = list(metrics)

        def save_here(state: TrainState) -> None:
            rows = list(_step_rows(joined(to_host(so_far)), number, reached, options.seeds))
            run.append_metrics(rows)
            save(number - 1, rows[-1]["step"], state)

        if interrupts.asked() and not several:  # several only know after an epoch that all are so far
            save_here(state)
            interrupts.release()
        elif copied is not None:
            hold(partial(save_here, copied(state)))
        if not by_epoch:
            ended = time.monotonic()

    def after_epoch(epoch: Epoch) -> None:
        nonlocal reached, bad, last_save, taken, ended
        tracing.close()
        if by_epoch or not taken:
            taken = time.monotonic() - ended
        hold()
        rows = list(_metric_rows(epoch, options.seeds))
        run.append_metrics(rows)
        if log is not None:
            _log(log, epoch, options.seeds)
        bad = _bad_steps(epoch.metrics["loss"], bad)
        diverged = bool(np.min(bad) >= _BAD_STEPS)
        reached = rows[-1]["step"]
        due, asked = processes.any_of(time.monotonic() - last_save >= options.save_seconds, interrupts.asked())
        if epoch.last or diverged or due or asked:
            save(epoch.number, reached, epoch.state)
            last_save = time.monotonic()
            interrupts.release()
            if asked:
                processes.end("another process of this run was stopped")
        elif copied is not None:
            hold(partial(save, epoch.number, reached, copied(epoch.state)))
        check_losses()
        before_epoch(epoch.number + 1)
        ended = time.monotonic()

    if not np.all(to_host(state.stopped)):
        how = {"epochs_done": done, "steps_done": reached, "after_interval": after_interval, "after_epoch": after_epoch}
        with tracing, interrupts.released():
            before_epoch(done + 1)
            state = fit(setup.problem, setup.rows, state, options.recipe, options.seeds, **how)
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
    fresh = start(setup.problem, options.seeds).params
    if jax.tree.map(jnp.shape, fresh) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            f"{options.start_from} was trained with the method {other.method} and other shapes "
            f"({', '.join(params)}): give the same --method and --granularity"
        )
    return params


def _bad_steps_before(run: RunFolder, seeds: tuple[int, ...], step: int) -> np.ndarray:
    """Return each seed's steps since its last finite loss, as the metrics up to a step record them."""
    bad = dict.fromkeys(seeds, 0)
    for row in run.metrics():
        if "loss" in row and row["step"] <= step and (seed := row.get("seed")) in bad:
            bad[seed] = bad[seed] + 1 if row["loss"] is None else 0  # null is not finite
    return np.array([bad[seed] for seed in seeds])


def _bad_steps(losses: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return each seed's steps since its last finite loss, of [steps, seeds] losses and the count before them."""
    finite = np.isfinite(losses)
    after = np.argmax(finite[::-1], axis=0)
    return np.where(finite.any(axis=0), after, before + len(losses))


def _step_rows(
    metrics: Mapping[str, np.ndarray], epoch: int, first_step: int, seeds: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    for i in range(len(next(iter(metrics.values())))):
        for s, seed in enumerate(seeds):
            values = {name: value[i, s].item() for name, value in metrics.items()}
            yield {"step": first_step + i + 1, "epoch": epoch, "seed": seed, **values}


def _metric_rows(epoch: Epoch, seeds: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    steps = len(next(iter(epoch.metrics.values())))
    yield from _step_rows(epoch.metrics, epoch.number, epoch.first_step, seeds)
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
    method, recipe = find(options.method), options.recipe
    if setup.split is None or method.learns == "given":
        return 0, 0
    train, validation = setup.split.train.shape[1], setup.split.validation.shape[1]
    if method.search is not None:
        return method.evaluations(recipe, setup.problem.index.shape[1]) * train, 0
    epochs = steps // -(-train // min(recipe.batch_size, train))
    ranking = 0 if choice_of(recipe) == "draw" else train
    return epochs * (train + validation) + ranking, epochs * train + ranking


def _prediction_rows(setup: Setup, seeds: tuple[int, ...], evaluation: Evaluation) -> Iterator[dict[str, Any]]:
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


def _config(options: FuseOptions, setup: Setup, found: Digests) -> RunConfig:
    return {
        "options": options,
        "modules": [list(modules) for modules in setup.modules],
        "task_sha256": setup.task.sha256,
        "max_new_tokens": setup.max_new_tokens,
        "environment": Environment(seed_mode=setup.problem.seed_mode, dtype=options.dtype, **environment()),
        "digests": found,
        "folders": _folders(options),
    }


def _folders(options: FuseOptions) -> Folders:
    found = Folders()
    for name in ("base", "pool", "task"):
        given = getattr(options, name)
        if given and not Path(given).expanduser().is_absolute() and Path(given).exists():
            found[name] = os.path.abspath(given)
    return found


def environment() -> dict[str, Any]:
    """Return the device, the cores and the versions that a result was made with."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"lorafusion-jax": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def options_to_json(options: FuseOptions) -> dict[str, Any]:
    """Return the options as JSON values."""
    return msgspec.json.decode(msgspec.json.encode(options, enc_hook=str))


def _recorded(run: RunFolder, options: FuseOptions) -> RunConfig:
    """Return the config of the run to resume, if its options are the same."""
    config = run.config()
    was, now = (_flat(options_to_json(o)) for o in (config["options"], options))
    different = [k for k in now if k not in _FREE_TO_CHANGE and now[k] != was.get(k)]
    if different:
        changes = "; ".join(f"{k} was {was.get(k)!r}, now {now[k]!r}" for k in different)
        raise ValueError(f"{run.folder} was begun with other options: {changes}. Resume it with the same")
    return config


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    groups = ("recipe", "arrays")
    flat = {name: value for name, value in options.items() if name not in groups}
    return flat | {name: value for group in groups for name, value in options[group].items()}


def _compare_environment(recorded: RunConfig, now: RunConfig) -> None:
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
