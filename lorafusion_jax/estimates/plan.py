"""`--plan`: a table of the cost of a matrix of methods, tasks and seeds, without running or loading weights."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..io.hf import Base, open_base
from ..io.pool import open_pool
from ..loading.model import load_texts, named_modules, packing_of
from ..methods.entry import basis_of, modules_of, recipe_of
from ..methods.fusion import choice_of
from ..models.architecture import Architecture
from ..models.registry import known_shapes
from ..runs.options import FuseOptions, read_task
from ..support.text_tables import markdown
from ..training.recipe import Recipe
from .estimate import Cost, Device, Settings, estimate, estimates, seeds_of
from .machines import Machine, Pace, PlanOptions, duration, machine, pace, spent
from .params import shape_config
from .workload import Shapes, Workload, workload

# Of a process on a CPU: Python, libraries, compiled programs and freed memory (docs/guides/paper.md).
PROCESS_BYTES = 2**30


class PoolShape(NamedTuple):
    """Shape of a pool; by default of one that does not exist yet, as LoraHub's."""

    rank: int = 16  # the largest of a module
    modules: int = 196
    targets: tuple[str, ...] | None = (
        None  # that any module adapts; None for the family's own choice
    )


class Row(NamedTuple):
    """One method of a matrix: the FLOPs of all its runs, and the bytes of its largest task."""

    method: str
    runs: int  # tasks times seeds
    cost: Cost
    jobs: tuple[float, ...]  # FLOPs of each task with all its seeds


def plan(
    config: Architecture,
    methods: Sequence[str],
    tasks: Mapping[str, Workload],
    settings: Settings,
    *,
    names: Sequence[str] = (),
    recipes: Sequence[Recipe] = (),
) -> list[Row]:
    """Return the cost of every method for all tasks and seeds.

    Names of the rows and recipes are in the order of the methods; by default all have that of the settings.
    """
    if not tasks or not methods:
        raise ValueError(
            f"a plan of {len(methods)} methods for {len(tasks)} tasks: give at least one of each"
        )
    rows = []
    recipes = recipes or [settings.recipe] * len(methods)
    for method, name, recipe in zip(methods, names or methods, recipes, strict=True):
        settings = dataclasses.replace(settings, recipe=recipe)
        costs = estimates(config, method, [*tasks.values()], settings)
        seeds = seeds_of(method, settings)
        cost = max(costs, key=lambda cost: cost.peak_bytes)._replace(
            forward_flops=max(cost.forward_flops for cost in costs),
            training_flops=seeds * sum(cost.training_flops for cost in costs),
            evaluation_flops=seeds * sum(cost.evaluation_flops for cost in costs),
        )
        jobs = tuple(
            seeds * (cost.training_flops + cost.evaluation_flops) for cost in costs
        )
        rows.append(Row(name, seeds * len(costs), cost, jobs))
    return rows


def plan_table(rows: Sequence[Row], at: Pace | None = None) -> str:
    """Return a Markdown table of the rows and their sum, with times at a pace."""
    head = "method,runs,trainable,forward,training,evaluation,weights,pool,state,activations,peak"
    head += "" if at is None else ",time of a job,time"
    lines: list[list[str]] = [[*head.split(",")]]
    for method, runs, (trainable, *numbers), jobs in rows:
        flops = map(_flops, numbers[:3])
        sizes = map(_bytes, numbers[3:])
        lines.append(
            [method, f"{runs:,}", f"{trainable:,}", *flops, *sizes, *_times(jobs, at)]
        )
    total = [
        sum(row.cost.training_flops for row in rows),
        sum(row.cost.evaluation_flops for row in rows),
    ]
    peak = _bytes(max(row.cost.peak_bytes for row in rows))
    times = _times([job for row in rows for job in row.jobs], at)
    runs = f"{sum(row.runs for row in rows):,}"
    lines.append(
        ["all", runs, "", "", *map(_flops, total), "", "", "", "", peak, *times]
    )
    return markdown(lines)


def _times(jobs: Sequence[float], at: Pace | None) -> list[str]:
    """Return the mean time of jobs and that of all, none without a pace."""
    if at is None:
        return []
    total = sum(jobs) / at.flops
    return [duration(total / len(jobs)), duration(total)]


def describe(
    rows: Sequence[Row],
    config: Architecture,
    tasks: Mapping[str, Workload],
    settings: Settings,
    *,
    where: Machine | None = None,
    at: Pace | None = None,
) -> str:
    """Return a description of how a matrix runs, and the costs of its rows, as `plan` returns them.

    Rows that need more bytes than the machine has are listed, and times are those at a pace.
    """
    order = "batched" if settings.seed_mode == "batched" else "one after the other"
    lines = [
        f"{len(rows)} methods and {len(tasks)} tasks, looped; {settings.seeds} seeds as one program, {order}."
    ]
    lines += [
        f"{name}: training in {_batches(work.steps)}, evaluation in {_batches(work.test.rows)}, "
        f"{work.new_tokens} new tokens at most; lengths {work.lengths}, padded."
        for name, work in tasks.items()
    ]
    lines += ["", plan_table(rows, at)]
    device = "a CPU" if settings.device == "cpu" else "an accelerator"
    stored = (
        "" if settings.load_in == "full" else f", base and pool in {settings.load_in}"
    )
    lines += [
        f"{config.dtype} on {device}{stored}. Forward FLOPs are those of one batch, other FLOPs those of all runs of a "
        "method.",
        "Bytes are those of one program with all its seeds, at its largest batch.",
    ]
    if settings.load_in != "full" and config.dtype == "float32":
        # Rows of 150 tokens, LoRAFusion: 19 GiB in nf4 with float32, 20.6 whole in bfloat16, 13 in nf4 with bfloat16.
        lines.append(
            f"Activations are float32: with a base in {settings.load_in}, a model of 8 billion parameters takes about "
            "as much memory as\nthe whole model in bfloat16 (20.6 GiB). Add --dtype bfloat16."
        )
    if settings.device == "cpu":
        lines.append(
            "The process takes about 0.9 GiB more: Python, libraries, compiled programs and freed memory that it "
            "keeps.\nA long training unrolls its layers, which adds at most 1 GiB."
        )
    else:
        lines.append("What else an accelerator holds was not measured.")
    if where is not None and where.capacity is not None:
        needed = PROCESS_BYTES if settings.device == "cpu" else 0
        over = [
            row.method for row in rows if row.cost.peak_bytes + needed > where.capacity
        ]
        fits = f"More than that need: {'; '.join(over)}." if over else "All rows fit."
        lines.append(f"The machine has {_bytes(where.capacity)}. {fits}")
    if where is not None and where.note:
        lines.append(where.note)
    return "\n".join(lines)


def describe_run(options: FuseOptions, asked: PlanOptions | None = None) -> str:
    """Return a description of the cost of a run, by default on this machine.

    The base may be the name of a shape, such as flan-t5-large; lengths are then estimated from characters. A pool that
    does not exist counts as LoraHub's adapters: 196 of rank 16, on the family's own choice of linear maps.
    """
    asked = asked or PlanOptions(plan=True)
    asked.check_plan()
    where = machine(asked.plan_for)
    config, work, settings = _planned(options, where)
    at = pace(asked, config, next(iter(work.values())).steps[0])
    rows = plan(config, [options.method], work, settings)
    described = describe(rows, config, work, settings, where=where, at=at)
    return f"{described}\n{spent(rows[0].jobs, at, asked)}"


def run_cost(options: FuseOptions, device: Device, base: Base | None = None) -> Cost:
    """Return the cost of a run on one device of a kind; the base and the pool are as in `describe_run`.

    The base may be opened already.
    """
    where = Machine(device, "sequential" if device == "cpu" else "batched")
    config, work, settings = _planned(options, where, base)
    return estimate(config, options.method, next(iter(work.values())), settings)


def run_pace(options: FuseOptions) -> Pace | None:
    """Return the pace of this machine for a run; None if its rate is not known."""
    asked = PlanOptions(plan=True)
    config, work, _ = _planned(options, machine(asked.plan_for))
    return pace(asked, config, next(iter(work.values())).steps[0])


def _planned(
    options: FuseOptions, where: Machine, base: Base | None = None
) -> tuple[Architecture, dict[str, Workload], Settings]:
    options.check()
    recipe = options.recipe
    k = (
        basis_of(recipe) if options.control == "none" else None
    )  # a control projects whole modules
    config = dataclasses.replace(
        shape_config(base or options.base), dtype=options.dtype
    )
    if options.base not in known_shapes():
        base = open_base(base or options.base)
    rank, size, targets = (
        PoolShape() if options.pool is None else pool_shape(Path(options.pool), k, base)
    )
    if options.adapters and options.pool and Path(options.pool).is_dir():
        named_modules(options.adapters, open_pool(Path(options.pool)).names)
    modules = len(options.adapters) or min(modules_of(recipe), size)
    recipe = recipe_of(type(recipe), vars(recipe) | {"modules": modules})
    module_count = len(options.adapters) or min(len(options.seeds) * modules, size)
    all_seeds = module_count if choice_of(recipe) == "draw" else size
    settings = Settings(
        recipe=recipe,
        rank=rank,
        targets=targets,
        pool=all_seeds or None,
        seeds=len(options.seeds),
        seed_mode=where.seed_mode if options.seed_mode == "auto" else options.seed_mode,
        device=where.device,
        load_in=options.load_in,
    )
    work = workloads([options], recipe, config, where, base)
    return config, work, settings


def workloads(
    runs: Iterable[FuseOptions],
    recipe: Recipe,
    config: Architecture,
    where: Machine,
    base: Base | None = None,
) -> dict[str, Workload]:
    """Return the workloads of runs by the names of their tasks, with batches and prompts of one recipe.

    The runs differ in their tasks. Their base may be the name of a shape, or be opened already.
    """
    works = {}
    texts = None
    for run in runs:
        if texts is None:
            texts = (
                {}
                if run.base in known_shapes()
                else load_texts(open_base(base or run.base), chat=run.chat)._asdict()
            )
        task = read_task(run, need=("train", "test"))
        works[task.name] = workload(
            task,
            recipe,
            packing=packing_of(config, on_cpu=where.device == "cpu"),
            **texts,
            train_rows=run.train_rows,
            test_rows=run.test_rows,
            eval_batch=run.eval_batch,
        )
    return works


def pool_shape(
    folder: Path, k: int | None = None, base: str | Base | None = None
) -> PoolShape:
    """Return the shape of a pool whose modules are fused whole or in k directions; LoraHub's without such a folder."""
    if not folder.is_dir():
        return PoolShape()
    pool = open_pool(folder, base)
    if k is not None:
        pool.check_basis(k)
    return PoolShape(pool.largest_rank, len(pool.names), pool.targets)


def _batches(shapes: Shapes) -> str:
    """Return the number of batches and their range of sizes."""
    rows = _range([shape.rows for shape in shapes])
    source = _range([shape.source for shape in shapes])
    target = _range([shape.target for shape in shapes])
    row_batches = f"{rows} rows,"
    if groups := shapes[0].groups:
        row_batches = f"{sum(count for count, *_ in groups)} packed rows, together"
    return f"{len(shapes):,} batches of {row_batches} {source} source and {target} target tokens"


def _range(sizes: list[int]) -> str:
    least = min(sizes)
    most = max(sizes)
    return str(least) if least == most else f"{least} to {most}"


def _flops(count: float | int) -> str:
    for exponent, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if count >= 10**exponent:
            return f"{count / 10**exponent:.3g} {prefix}FLOP"
    return f"{count:.0f}"


def _bytes(count: float | int) -> str:
    for exponent, prefix in ((30, "G"), (20, "M"), (10, "K")):
        if count >= 2**exponent:
            return f"{count / 2**exponent:.2f} {prefix}iB"
    return f"{count:.0f}"
