"""A matrix of runs, tasks by methods by shots: every result is a row of one JSONL file, and none is run twice.

All seeds of a task and method are one program (see `lorafusion fuse`); tasks, methods and shots are looped over.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lorafusion_jax import PRESETS, FewShotRecipe, FuseOptions, Recipe, fuse
from lorafusion_jax.estimates import (
    PlanOptions,
    Settings,
    describe,
    machine,
    pace,
    plan,
    pool_shape,
    shape_config,
    spent,
    workloads,
)
from lorafusion_jax.io import open_pool
from lorafusion_jax.loading import LoadIn
from lorafusion_jax.methods import (
    basis_of,
    choice_of,
    find,
    modules_of,
    recipe_of as recipe_with,
)
from lorafusion_jax.trials import EngineOptions, Job, Shots, run_jobs

# Rows that a seed uses, and passes over them.
TRAIN_ROWS: dict[Shots, int] = {"95+5": 100, "5": 5}
EPOCHS: dict[Shots, int] = {"95+5": 20, "5": 40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A method with its settings: a row of a table, and its run.

    Attributes:
      method: name of the method, as in `lorafusion fuse`.
      control: control of the pool.
      recipe: differences from the default recipe, without learning rates.
      rates: learning rates, found by `python experiments/tune.py`.
      few_rates: those for five examples, where they are other ones, found by `python experiments/tune.py --shots 5`.
      train_rows: fewer rows to learn from than the others have.
      load_in: base and pool in 4 or 8 bits.
    """

    method: str
    control: Literal["none", "random-factors", "shuffled"] = "none"
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    few_rates: dict[str, float] = dataclasses.field(default_factory=dict)
    train_rows: int | None = None
    load_in: LoadIn | None = None


def recipe_of(arm: Arm, *, shots: Shots = "95+5", **defaults: Any) -> Recipe:
    """Return the recipe of an arm; it has those of the default numbers that its method has.

    Rows are padded, as they were for the committed results.

    Raises:
      TypeError: the arm has a number that its method does not have.
    """
    kind = find(arm.method).recipe
    rates = (shots == "5" and arm.few_rates) or arm.rates
    shared = recipe_with(kind, {"epochs": EPOCHS[shots], "pack": False} | defaults)
    return dataclasses.replace(shared, **arm.recipe | rates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixOptions(EngineOptions, PlanOptions):
    """Common options of matrices.

    Attributes:
      base: the base model, a folder, hub id or GGUF file.
      pool: a converted pool, or a folder of PEFT adapters.
      tasks: task folders or files.
      prompt: template of the model's input, with {input} or other columns of the tasks' rows.
      chat: put the input into the base's own chat template, as the user's message.
      methods: rows of the table; all by default.
      seeds: each draws modules, starts and orders of rows.
      shots: rows to learn from: 95 and 5 for validation, or LoraHub's 5.
      modules: that a seed draws from the pool.
      epochs: passes over the training rows; by default 20, and 40 over five examples.
      out: folder of results.jsonl and the runs; what is there already is not run again.
      dtype: dtype of weights and activations.
      load_in: hold base and pool in 4 or 8 bits.
      test_rows: evaluate on the first rows only.
      eval_batch: rows in a batch of generation.
      retry_failed: also run what ran out of memory before, which OUT/failed.jsonl lists.
    """

    base: str
    pool: str
    tasks: tuple[str, ...]
    prompt: str | None = None
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    shots: tuple[Shots, ...] = ("95+5",)
    modules: int = PRESETS["default"].modules
    epochs: int | None = None
    out: Path = Path("runs/matrix")
    dtype: Literal["float32", "bfloat16"] = "float32"
    load_in: LoadIn = "full"
    test_rows: int | None = None
    eval_batch: int = 64
    retry_failed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def __post_init__(self):
        super().__post_init__()
        self.check_plan()


def run_matrix(
    options: MatrixOptions, arms: Mapping[str, Arm], *, root: Path | None = None
) -> Path:
    """Run what is missing of a matrix, and return its file of rows; `root` is as in `run_jobs`.

    Raises:
      ValueError: an unknown method, no task, a pool of fewer modules than are asked for, or rows of other settings;
        every job ran out of memory; and as `fuse` does.
    """
    file = options.out / "results.jsonl"
    run_jobs(
        jobs(options, arms),
        file,
        fuse,
        root=root,
        retry_failed=options.retry_failed,
        engine=options,
    )
    return file


def jobs(
    options: MatrixOptions, arms: Mapping[str, Arm], *, check_pool: bool = True
) -> Iterator[Job]:
    """Yield the programs of a matrix, task by task; errors are those of `run_matrix`."""
    chosen = options.methods or tuple(arms)
    if unknown := [method for method in chosen if method not in arms]:
        raise ValueError(f"no method {', '.join(unknown)}: choose of {'; '.join(arms)}")
    if not options.tasks:
        raise ValueError("no task: give at least one with --tasks")
    if check_pool:
        _check_pool(options, [arms[method] for method in chosen])
    for shots in options.shots:
        for task in options.tasks:
            name = Path(task).stem if Path(task).is_file() else Path(task).name
            for method in chosen:
                yield Job(
                    name,
                    method,
                    shots,
                    _fuse_options(options, task, name, method, shots, arms[method]),
                )


def _fuse_options(
    options: MatrixOptions, task: str, name: str, method: str, shots: Shots, arm: Arm
) -> FuseOptions:
    recipe = recipe_of(arm, shots=shots, modules=options.modules)
    return FuseOptions(
        base=options.base,
        pool=options.pool if find(arm.method).pool else None,
        task=task,
        seeds=options.seeds,
        out=options.out / "runs",
        # The seeds are part of the name, so that further ones, added later, are a separate run.
        name="-".join((name, method, shots, *map(str, options.seeds)))
        .replace(" ", "_")
        .replace(",", ""),
        method=arm.method,
        control=arm.control,
        prompt=options.prompt,
        chat=options.chat,
        recipe=dataclasses.replace(
            recipe, epochs=recipe.epochs if options.epochs is None else options.epochs
        ),
        train_rows=min(arm.train_rows or TRAIN_ROWS[shots], TRAIN_ROWS[shots]),
        test_rows=options.test_rows,
        eval_batch=options.eval_batch,
        dtype=options.dtype,
        load_in=options.load_in if arm.load_in is None else arm.load_in,
        resume=True,
    )


def _check_pool(options: MatrixOptions, arms: Sequence[Arm]) -> None:
    most_modules = max(
        (arm.recipe.get("modules", options.modules) for arm in arms), default=0
    )
    if not any(find(arm.method).pool for arm in arms):
        return
    available = len(open_pool(options.pool).names)
    if available < most_modules:
        raise ValueError(
            f"{options.pool} holds {available} modules, and {most_modules} are to be drawn: give fewer with --modules"
        )


def print_matrix_plan(options: MatrixOptions, arms: Mapping[str, Arm]) -> None:
    """Print what the programs of a matrix compute and hold: a table for all rows of the same numbers.

    The base may be the name of a shape, such as flan-t5-large: lengths are then estimated from characters, and a pool
    that is not there counts as one of rank 16 on q and v.

    Raises:
      ValueError: as `run_matrix` does.
    """
    config = dataclasses.replace(shape_config(options.base), dtype=options.dtype)
    pool = Path(options.pool)
    where = machine(options.plan_for)
    groups: dict[tuple[Any, ...], list[Job]] = {}
    at = None
    of_all = []
    for job in jobs(options, arms, check_pool=pool.is_dir()):
        recipe = job.options.recipe
        # Methods without a pool are planned next to those that fuse the matrix' number of modules.
        fused = (
            modules_of(recipe) or options.modules,
            choice_of(recipe),
            basis_of(recipe),
        )
        work = (recipe.epochs, recipe.batch_size, recipe.max_new_tokens)
        groups.setdefault(
            (job.shots, job.options.train_rows, job.options.load_in, fused, work), []
        ).append(job)
    for (
        shots,
        rows,
        load_in,
        (modules, choose, basis),
        (epochs, *_),
    ), group_jobs in groups.items():
        options_by_task = {job.task: job.options for job in group_jobs}
        options_by_method = {job.method: job.options for job in group_jobs}
        recipes = [options.recipe for options in options_by_method.values()]
        rank, size, targets = pool_shape(pool, basis)
        settings = Settings(
            rank=rank,
            targets=targets,
            # Those that any seed draws: at most as many as all of them together.
            pool=min(len(options.seeds) * modules, size) if choose == "draw" else size,
            seeds=len(options.seeds),
            seed_mode=where.seed_mode,
            device=where.device,
            load_in=load_in,
        )
        prompted = next(
            (recipe for recipe in recipes if isinstance(recipe, FewShotRecipe)),
            recipes[0],
        )
        work = workloads(options_by_task.values(), prompted, config, where)
        chosen = f"{modules} modules" + ("" if choose == "draw" else f" by {choose}")
        within = ""
        if basis is not None:
            within = f", in a basis of {basis}"
        few = "" if rows == TRAIN_ROWS[shots] else f" over {rows} rows"
        print(f"{shots} shots, {epochs} epochs{few}, {chosen}{within}")
        methods = [options.method for options in options_by_method.values()]
        at = at or pace(options, config, next(iter(work.values())).steps[0])
        planned = plan(
            config, methods, work, settings, names=[*options_by_method], recipes=recipes
        )
        print(describe(planned, config, work, settings, where=where, at=at))
        of_all += [job for row in planned for job in row.jobs]
    print(spent(of_all, at, options))
