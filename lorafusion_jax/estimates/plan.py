"""`--plan`: a table of the cost of a matrix of methods, tasks and seeds, without running or loading weights."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ..io.pool import open_pool
from ..loading.model import load_texts, module_names, named_modules, packing_of
from ..methods.fusion import choice_of
from ..methods.recipes import basis_of, modules_of, recipe_of
from ..models.architecture import Architecture
from ..models.registry import known_shapes
from ..runs.options import FuseOptions, row_format
from ..runs.prepare import check
from ..support.platform import for_cpu
from ..support.text_tables import markdown
from ..tasks import load_task
from ..training.recipe import Recipe
from ..training.seeds import SeedMode, default_seed_mode
from .estimate import Cost, Settings, estimate, seeds_of
from .memory import Device
from .params import shape_config
from .workload import Shapes, Workload, workload


class Machine(NamedTuple):
    """A machine to plan for, with its default mode of seeds."""

    device: Device
    seed_mode: SeedMode
    capacity: int | None = None  # bytes of the device's memory, as its maker states them


# H100 SXM: 80 GB (NVIDIA's data sheet). TPU v5e: 16 GB a chip (Google Cloud's "TPU v5e").
MachineName = Literal["h100", "v5e", "cpu"]
_MACHINES: dict[MachineName, Machine] = {
    "h100": Machine("accelerator", "batched", 80 * 10**9),
    "v5e": Machine("accelerator", "batched", 16 * 10**9),
    "cpu": Machine("cpu", "sequential"),
}


def machine(name: MachineName | None) -> Machine:
    """Return a machine by its name; this one without a name."""
    return _MACHINES[name] if name else Machine("cpu" if for_cpu() else "accelerator", default_seed_mode())


class PoolShape(NamedTuple):
    """Shape of a pool; by default of one that does not exist yet, as LoraHub's."""

    rank: int = 16  # the largest of a module
    modules: int = 196
    targets: tuple[str, ...] | None = None  # that any module adapts; None for the family's own choice


class Row(NamedTuple):
    """One method of a matrix: the FLOPs of all its runs, and the bytes of its largest task."""

    method: str
    runs: int  # tasks times seeds
    cost: Cost


def plan(
    config: Architecture,
    methods: Sequence[str],
    tasks: Mapping[str, Workload],
    settings: Settings,
    *,
    recipes: Sequence[Recipe] = (),
) -> list[Row]:
    """Return the cost of every method for all tasks and seeds.

    Recipes are in the order of the methods; by default all have that of the settings.
    """
    if not tasks or not methods:
        raise ValueError(f"a plan of {len(methods)} methods for {len(tasks)} tasks: give at least one of each")
    rows = []
    for method, recipe in zip(methods, recipes or [settings.recipe] * len(methods), strict=True):
        settings = dataclasses.replace(settings, recipe=recipe)
        costs = [estimate(config, method, work, settings) for work in tasks.values()]
        seeds = seeds_of(method, settings)
        cost = max(costs, key=lambda cost: cost.peak_bytes)._replace(
            forward_flops=max(cost.forward_flops for cost in costs),
            training_flops=seeds * sum(cost.training_flops for cost in costs),
            evaluation_flops=seeds * sum(cost.evaluation_flops for cost in costs),
        )
        rows.append(Row(method, seeds * len(costs), cost))
    return rows


def plan_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the rows and their sum."""
    head = "method,runs,trainable,forward,training,evaluation,weights,pool,state,activations,peak"
    lines: list[list[str]] = [[*head.split(",")]]
    for method, runs, (trainable, *numbers) in rows:
        flops, held = map(_flops, numbers[:3]), map(_bytes, numbers[3:])
        lines.append([method, f"{runs:,}", f"{trainable:,}", *flops, *held])
    total = [sum(row.cost.training_flops for row in rows), sum(row.cost.evaluation_flops for row in rows)]
    peak = _bytes(max(row.cost.peak_bytes for row in rows))
    lines.append(["all", f"{sum(row.runs for row in rows):,}", "", "", *map(_flops, total), "", "", "", "", peak])
    return markdown(lines)


def describe(
    config: Architecture,
    methods: Sequence[str],
    tasks: Mapping[str, Workload],
    settings: Settings,
    *,
    names: Sequence[str] = (),
    recipes: Sequence[Recipe] = (),
    capacity: int | None = None,
) -> str:
    """Return a description of how a matrix runs, and its costs; arguments and errors are those of `plan`.

    Rows have other names than their methods where these occur several times. Those that need more bytes than the
    device's capacity are listed.
    """
    rows = plan(config, methods, tasks, settings, recipes=recipes)
    rows = [row._replace(method=name) for row, name in zip(rows, names or methods, strict=True)]
    how = "batched" if settings.seed_mode == "batched" else "one after the other"
    lines = [f"{len(methods)} methods and {len(tasks)} tasks, looped; {settings.seeds} seeds as one program, {how}."]
    lines += [
        f"{name}: training in {_batches(work.steps)}, evaluation in {_batches(work.test.rows)}, "
        f"{work.new_tokens} new tokens at most; lengths {work.lengths}, padded."
        for name, work in tasks.items()
    ]
    where = "a CPU" if settings.device == "cpu" else "an accelerator"
    held = "" if settings.load_in == "full" else f", base and pool in {settings.load_in}"
    if settings.device == "cpu":
        # Measured on FLAN-T5-large's shape (docs/results/bbh.md).
        more = "The process takes about 0.9 GiB more:\n"
        more += "Python, libraries, compiled programs and freed memory that it keeps."
    else:
        more = "What else an accelerator holds was not measured."
        if capacity is not None:
            over = [row.method for row in rows if row.cost.peak_bytes > capacity]
            fits = f"More than that need: {'; '.join(over)}." if over else "All rows fit."
            more += f"\nThe device has {_bytes(capacity)}. {fits}"
    return (
        "\n".join(lines) + f"\n\n{plan_table(rows)}\n"
        f"{config.dtype} on {where}{held}. Forward FLOPs are those of one batch, other FLOPs those of all runs of a "
        f"method.\nBytes are those of one program with all its seeds, at its largest batch. {more}"
    )


def describe_run(options: FuseOptions, name: MachineName | None = None) -> str:
    """Return a description of the cost of a run, on this machine or a named one.

    The base may be the name of a shape, such as flan-t5-large; lengths are then estimated from characters. A pool that
    does not exist counts as LoraHub's adapters: 196 of rank 16, on the family's own choice of linear maps.
    """
    where = machine(name)
    config, work, settings = _planned(options, where)
    return describe(config, [options.method], work, settings, capacity=where.capacity)


def run_cost(options: FuseOptions, device: Device) -> Cost:
    """Return the cost of a run on one device of a kind; the base and the pool are as in `describe_run`."""
    where = Machine(device, "sequential" if device == "cpu" else "batched")
    config, work, settings = _planned(options, where)
    return estimate(config, options.method, next(iter(work.values())), settings)


def _planned(options: FuseOptions, where: Machine) -> tuple[Architecture, dict[str, Workload], Settings]:
    check(options)
    recipe = options.recipe
    k = basis_of(recipe) if options.control == "none" else None  # a control projects whole modules
    base = None if options.base in known_shapes() else options.base
    rank, size, targets = PoolShape() if options.pool is None else pool_shape(Path(options.pool), k, base)
    if options.adapters and options.pool and Path(options.pool).is_dir():
        named_modules(options, module_names(open_pool(Path(options.pool)), options))
    modules = len(options.adapters) or min(modules_of(recipe), size)
    recipe = recipe_of(type(recipe), vars(recipe) | {"modules": modules})
    drawn = len(options.adapters) or min(len(options.seeds) * modules, size)
    all_seeds = drawn if choice_of(recipe) == "draw" else size
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
    config = dataclasses.replace(shape_config(options.base), dtype=options.dtype)
    work = workloads([options], recipe, config, where)
    return config, work, settings


def workloads(
    runs: Iterable[FuseOptions], recipe: Recipe, config: Architecture, where: Machine
) -> dict[str, Workload]:
    """Return the workloads of runs by the names of their tasks, with batches and prompts of one recipe.

    The runs differ in their tasks. Their base may be the name of a shape.
    """
    found, texts = {}, None
    for run in runs:
        if texts is None:
            texts = {} if run.base in known_shapes() else load_texts(run)._asdict()
        task = load_task(run.task, **row_format(run), train_rows=run.train_rows)
        found[task.name] = workload(
            task,
            recipe,
            packing=packing_of(config, on_cpu=where.device == "cpu"),
            **texts,
            train_rows=run.train_rows,
            test_rows=run.test_rows,
            eval_batch=run.eval_batch,
        )
    return found


def pool_shape(folder: Path, k: int | None = None, base: str | None = None) -> PoolShape:
    """Return the shape of a pool whose modules are fused whole or in k directions; LoraHub's without such a folder."""
    if not folder.is_dir():
        return PoolShape()
    pool = open_pool(folder, base)
    names = pool.names if k is None else pool.basis_modules(k)
    return PoolShape(pool.largest_rank, len(names), pool.targets)


def _batches(shapes: Shapes) -> str:
    """Return the number of batches and their range of sizes."""
    columns = ([getattr(shape, name) for shape in shapes] for name in ("rows", "source", "target"))
    sizes = (sorted(set(column)) for column in columns)
    rows, source, target = (str(s[0]) if len(s) == 1 else f"{s[0]} to {s[-1]}" for s in sizes)
    of_rows = (
        f"{sum(count for count, *_ in shapes[0].groups)} packed rows, together" if shapes[0].groups else f"{rows} rows,"
    )
    return f"{len(shapes):,} batches of {of_rows} {source} source and {target} target tokens"


def _flops(count: float | int) -> str:
    for unit, name in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f}"


def _bytes(count: float | int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f}"
