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
import jax.numpy as jnp
import numpy as np

from ..io import arrays
from ..io.digests import Digests
from ..io.hf import Base, open_base
from ..io.pool import open_pool
from ..loading.identity import check_digests, digests
from ..loading.model import LoadedModel, load_model, with_modules, with_whole_modules
from ..methods.fusion import CoefficientsRecipe, FusionRecipe, choice_of
from ..methods.lora import LoRA, LoRARecipe, is_warm
from ..methods.recipes import TargetedRecipe, basis_of, modules_of, recipe_of
from ..support import processes
from ..support.platform import cores
from ..support.reading import FileError
from ..support.text import some
from ..support.version import __version__
from ..tasks import Task, task_name
from ..training.compiled import make_room
from ..training.descent import gradient_at_zero
from ..training.fit import start
from ..training.mesh import make_mesh, to_host
from ..training.method import Params
from ..training.recipe import Recipe
from .evaluate import Evaluation, evaluate_seeds, seed_rows
from .folder import Environment, Folders, RunConfig, RunFolder, note
from .options import FuseOptions, options_to_json
from .setup import Setup, load_setup, of_run, trainable_count, unrolls
from .train import FINAL, FinalSteps, train
from .weight_list import listed_params, read_weights, with_listed_modules

# Options that may differ between a run and its resumption.
_FREE_TO_CHANGE = (
    *("resume", "overwrite", "save_seconds", "out", "name", "eval_batch"),
    *("mesh", "distributed", "coordinator", "processes", "process"),
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers")


class HardwareSetup(NamedTuple):
    """A run on hardware."""

    training: Setup  # setup of the training
    tested: Callable[
        [Params], Setup
    ]  # function from the trained parameters to the setup of the evaluation


# Puts a run on hardware: (digital setup, options, numbers to start from).
SetUpHardware = Callable[[Setup, FuseOptions, Params], HardwareSetup]


def run(options: FuseOptions, set_up: SetUpHardware | None = None) -> dict[str, Any]:
    """Do a run, and return the results as they are in results.json.

    `set_up` puts the run on the hardware of its options; without it the run is digital. Options or files that cannot be
    used are a ValueError before anything is written.
    """
    options = with_listed_modules(options)
    options.check()
    base = open_base(options.base)
    make_room()
    with contextlib.ExitStack() as stack:
        if options.distributed:
            stack.enter_context(
                processes.joined(
                    options.coordinator, options.processes, options.process
                )
            )
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
) -> dict[str, Any]:
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


def with_targets(options: FuseOptions, base: Base | None = None) -> FuseOptions:
    """Return the options as a run records them, with the targets of the model's family, or of the pool, by default."""
    recipe = options.recipe
    if not isinstance(recipe, TargetedRecipe) or recipe.lora_targets is not None:
        return options
    base = base or open_base(options.base)
    pool = open_pool(options.pool, base) if options.pool and is_warm(recipe) else None
    targets = base.config.targets if pool is None else pool.targets
    return dataclasses.replace(
        options, recipe=dataclasses.replace(recipe, lora_targets=targets)
    )


def _run(
    options: FuseOptions, base: Base, set_up: SetUpHardware | None
) -> dict[str, Any]:
    options.entry.check()
    run = RunFolder(run_path(options))
    if not options.resume:
        _refuse_begun(run)
    recorded = _recorded(run, options) if options.resume and run.exists() else None
    if recorded is not None and (done := run.results()) is not None:
        note(f"{run.folder} is complete: nothing to resume")
        return dict(done)
    *before, last = stages(options)
    for stage in before:
        _check_targets(last, base)
        _run(stage, base, set_up)
    setup = load_setup(
        last,
        seed_mode=recorded["environment"]["seed_mode"] if recorded else None,
        base=base,
    )
    if setup.task.one_list:
        note(_division(setup.task, last))
    if choice_of(options.recipe) != "draw":
        setup = _chosen(setup, options, recorded)
    current_digests = digests(setup)
    begin, left_out = _start_params(setup, last, current_digests)
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
    processes.barrier("every process has read what is there")
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


def stages(options: FuseOptions) -> tuple[FuseOptions, ...]:
    """Return the runs that make up a run: itself, or with a warm start a fusion in its folder, then a LoRA from it."""
    recipe = options.recipe
    if not is_warm(recipe):
        return (options,)
    folder = run_path(options)
    half = recipe.epochs // 2
    shared = {
        field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)
    }
    fusion = recipe_of(FusionRecipe, shared | {"epochs": half})
    lora = dataclasses.replace(recipe, epochs=recipe.epochs - half, warm_start="none")
    first = dataclasses.replace(
        options, method="fusion", recipe=fusion, out=folder, name="fusion"
    )
    return first, dataclasses.replace(
        options, recipe=lora, start_from=folder / "fusion"
    )


def _check_targets(options: FuseOptions, base: Base) -> None:
    """Raise ValueError, before its first stage, if a LoRA with a warm start does not adapt all that the pool does."""
    assert isinstance(options.recipe, LoRARecipe) and options.pool is not None
    missing = {*open_pool(options.pool, base).targets} - {
        *(options.recipe.lora_targets or ())
    }
    if missing:
        raise ValueError(
            f"{options.pool} adapts {some(sorted(missing))}, which --lora-targets leaves out: add them"
        )


def _chosen(setup: Setup, options: FuseOptions, recorded: RunConfig | None) -> Setup:
    """Return the setup with the modules of the resumed run, or with those that lower the loss fastest at c = 0."""
    if recorded is not None:
        return with_modules(setup, options, recorded["modules"])
    recipe = options.recipe
    in_whole = basis_of(recipe) is not None and choice_of(recipe) == "gradient"
    ranked = with_whole_modules(setup, options) if in_whole else setup
    gradient = gradient_at_zero(
        ranked.problem, options.seeds, list(ranked.rows.once(recipe.batch_size))
    )
    descent = -np.sum(
        gradient, axis=tuple(range(2, gradient.ndim))
    )  # [seeds, modules], over columns of coefficients
    greatest = np.argsort(-descent, axis=1, kind="stable")[:, : modules_of(recipe)]
    seed_choices = zip(ranked.modules, greatest.tolist(), strict=True)
    return with_modules(
        setup,
        options,
        [[modules[i] for i in chosen] for modules, chosen in seed_choices],
    )


def _refuse_begun(run: RunFolder) -> None:
    if run.exists():
        raise ValueError(
            f"{run.folder} holds a run: give this one another --name, continue that one with --resume, or replace it "
            "with --overwrite"
        )


def run_path(options: FuseOptions) -> Path:
    """Return the folder of the run: OUT/NAME, by default OUT/TASK-METHOD, with -CONTROL and -DRAW after it if given."""
    task = task_name(options.task)
    control = "" if options.control == "none" else f"-{options.control}"
    control += f"-{options.control_draw}" if options.control_draw else ""
    return Path(options.out) / (options.name or f"{task}-{options.method}{control}")


def load_run(folder: str | Path) -> tuple[FuseOptions, dict[str, Any], RunConfig]:
    """Return the options, the trained parameters (leaves with an axis of seeds) and the config of a run."""
    run = RunFolder(Path(folder))
    config = run.config()
    options = _located(config)
    if options.entry.learns == "untrained":
        return options, {}, config
    if not run.final.is_dir():
        raise ValueError(
            f"{folder} has not been trained to its end: resume it with --resume"
        )
    params, _ = arrays.load(run.final, metadata=FinalSteps, what=FINAL)
    if wrong := [
        p.shape for p in jax.tree.leaves(params) if p.shape[:1] != (len(options.seeds),)
    ]:
        expected = f"an axis of {len(options.seeds)} seeds"
        fix = "restore it from a copy, or train again"
        raise FileError(
            run.final,
            got=f"has an array of shape {wrong[0]}",
            expected=expected,
            fix=fix,
        )
    return options, jax.device_put(params), config


def load_seed(
    folder: Path, seed: int | None
) -> tuple[FuseOptions, Params, RunConfig, int]:
    """Return the options of a run, the numbers of one seed (by default its first), the config, and the seed's place."""
    options, params, config = load_run(folder)
    place = seed_place(folder, options.seeds, seed)
    return (
        options,
        jax.device_put(jax.tree.map(lambda p: p[place], to_host(params))),
        config,
        place,
    )


def check_answers(folder: Path, options: FuseOptions) -> None:
    """Raise a ValueError for a run whose method needs rows of the task to answer."""
    if options.entry.answers != "model":
        raise ValueError(
            f"{folder} is of {options.method}, which needs rows of its task: use `lorafusion evaluate`"
        )


def seed_place(folder: Path, seeds: tuple[int, ...], seed: int | None) -> int:
    """Return the place of one of a run's seeds (by default its first) among them; raises a ValueError for others."""
    if seed is not None and seed not in seeds:
        raise ValueError(
            f"{folder} has no seed {seed}: it has {', '.join(map(str, seeds))}; choose one"
        )
    return 0 if seed is None else seeds.index(seed)


def _located(config: RunConfig) -> FuseOptions:
    """Return the options of a run with absolute paths instead of relative ones."""
    options = config["options"]
    for name, path in config["folders"].items():
        source = Path(getattr(options, name) or "").expanduser()
        # In a project that was moved as a whole, only the relative paths lead to the files.
        if not source.is_absolute() and (
            Path(str(path)).exists() or not source.exists()
        ):
            options = dataclasses.replace(options, **{name: path})
    return options


def _complete(
    run: RunFolder,
    hardware: HardwareSetup,
    options: FuseOptions,
    config: RunConfig,
    begin: dict[str, Any] | None,
    left_out: Sequence[dict[str, Any]],
) -> dict[str, Any]:
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
    results = {
        "task": setup.task.name,
        "method": options.method,
        "control": options.control,
        "trainable": sum(counts.values()),
        "trainable_by_group": counts,
        "exact_match": None if matches is None else float(np.mean(matches)),
        "exact_match_std": spread,
        "seeds": [
            row
            | {"steps": steps[i], "modules": list(setup.modules[i])}
            | rows_passed(setup, options, steps[i])
            | left_out[i]
            for i, row in enumerate(seed_rows(seeds, evaluation))
        ],
        "test_rows": len(setup.test),
        "test_sha256": hashlib.sha256(tested.encode()).hexdigest(),
        "seconds": {"train": seconds, "evaluate": evaluated - trained},
        "environment": config["environment"],
    }
    run.write_results(results)
    return results


def _start_params(
    setup: Setup, options: FuseOptions, current_digests: Digests
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the numbers to start from, and for the results of each seed what a LoRA's rank leaves out of them.

    Raises:
      ValueError: the numbers do not fit this run, whose digests are given.
    """
    nothing: list[dict[str, Any]] = [{}] * len(options.seeds)
    if options.start_from is None:
        return None, nothing
    if (
        isinstance(setup.problem.method, LoRA)
        and (source := _lora_source(setup, options)) is not None
    ):
        return _lora_start(setup, options, *source)
    if (listed := read_weights(options.start_from)) is not None:
        return listed_params(setup, options, current_digests, *listed), nothing
    source_options, params, config = load_run(options.start_from)
    run_fields = {
        "seeds": list(options.seeds),
        "modules": [list(m) for m in setup.modules],
    }
    got = {"seeds": list(source_options.seeds), "modules": config["modules"]}
    if run_fields != got:
        raise ValueError(
            f"{options.start_from} fused other modules or seeds (seeds {got['seeds']}, here {run_fields['seeds']}): "
            "give the same --seeds, --pool, --modules"
        )
    check_digests(options.start_from, config["digests"], current_digests, options)
    fresh = start(setup.problem, options.seeds).params
    if jax.tree.map(jnp.shape, fresh) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            f"{options.start_from} was trained with the method {source_options.method} and other shapes "
            f"({', '.join(params)}): give the same --method and --granularity"
        )
    return params, nothing


def _lora_source(
    setup: Setup, options: FuseOptions
) -> tuple[LoadedModel, Params] | None:
    """Return the model that a LoRA starts from, with the numbers of all seeds; None for a run of the same method."""
    folder = options.start_from
    assert folder is not None
    if (listed := read_weights(folder)) is None and not (
        folder / "adapter_config.json"
    ).is_file():
        source_options, params, config = load_run(folder)
        if source_options.method == options.method:
            return None
        if source_options.seeds != options.seeds:
            raise ValueError(
                f"{folder} has the seeds {list(source_options.seeds)}, here {list(options.seeds)}: give the same"
            )
        first = jax.tree.map(lambda p: p[0], params)
        return of_run(
            load_model(source_options, like=setup),
            source_options,
            folder,
            config,
            first,
        ), params
    pool = options.pool if listed else str(folder.parent)
    weights, recorded = listed or ({folder.name: 1.0}, None)
    changes: Any = {
        "method": "coefficients",
        "recipe": CoefficientsRecipe(),
        "adapters": tuple(weights),
        "pool": pool,
    }
    source = dataclasses.replace(options, **changes)
    loaded = load_model(source, like=setup)
    return loaded, listed_params(loaded, source, digests(loaded), weights, recorded)


def _lora_start(
    setup: Setup, options: FuseOptions, source: LoadedModel, params: Params
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the numbers of a LoRA whose model is the source's as far as its rank allows, and what that leaves out."""
    method = setup.problem.method
    fresh = start(setup.problem, options.seeds).params
    assert isinstance(method, LoRA)
    try:
        begin, left_out = method.start_at(source.problem, params, fresh)
    except ValueError as error:
        raise ValueError(f"--from {options.start_from}: {error}") from error
    shares = [100 * share for seed_shares in left_out for share in seed_shares.values()]
    note(
        f"starts from {options.start_from} at rank {method.rank}, which leaves out {min(shares):.1f} to "
        f"{max(shares):.1f} % of the squared norm of a site's update"
    )
    return begin, [{"left_out": seed_shares} for seed_shares in left_out]


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
