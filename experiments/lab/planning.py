"""Plan of a matrix: its runs and their cost, printed without running or loading weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafusion_jax.estimates.estimate import Settings
from lorafusion_jax.estimates.params import shape_config
from lorafusion_jax.estimates.plan import describe, machine, pool_shape
from lorafusion_jax.estimates.workload import workload
from lorafusion_jax.methods.method import WITH_CORE
from lorafusion_jax.models.registry import known_shapes
from lorafusion_jax.runs.prepare import load_texts
from lorafusion_jax.tasks import load_task

from .common import TRAIN_ROWS
from .jobs import Job
from .matrix import MatrixOptions, jobs
from .methods import Entry

# Numbers of a recipe that FLOPs or bytes depend on; a composition is a part of the method's name.
_COUNTED = (
    *("modules", "choose", "basis", "core", "granularity", "epochs", "batch_size", "max_new_tokens"),
    *("lora_rank", "lora_targets", "vera_rank", "evaluations", "generations", "population", "shots"),
)


def print_matrix_plan(options: MatrixOptions, entries: Mapping[str, Entry]) -> None:
    """Print what the programs of a matrix compute and hold: a table for all rows of the same numbers.

    The base may be the name of a shape, such as flan-t5-large: lengths are then estimated from characters, and a pool
    that is not there counts as one of rank 16 on q and v.

    Raises:
      ValueError: as `run_matrix` does.
    """
    config = dataclasses.replace(shape_config(options.base), dtype=options.dtype)
    pool, where = Path(options.pool), machine(options.plan_for)
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs(options, entries, check_pool=pool.is_dir()):
        numbers = (getattr(job.options.recipe, name) for name in _COUNTED)
        groups.setdefault((job.league, job.options.train_rows, job.options.load_in, *numbers), []).append(job)
    for (league, rows, load_in, *_), of_group in groups.items():
        recipe, tasks = of_group[0].options.recipe, {job.task: job.options.task for job in of_group}
        rank, size, targets = pool_shape(pool, recipe.basis)
        settings = Settings(
            recipe=recipe,
            rank=rank,
            targets=targets,
            # Those that any seed draws: at most as many as all of them together.
            pool=min(len(options.seeds) * recipe.modules, size) if recipe.choose == "draw" else size,
            seeds=len(options.seeds),
            path=where.path,
            device=where.device,
            load_in=load_in,
        )
        how: dict[str, Any] = {"train_rows": rows, "test_rows": options.test_rows}
        if options.base not in known_shapes():
            how |= load_texts(of_group[0].options)._asdict()
        work = {
            name: workload(load_task(task), recipe, eval_batch=options.eval_batch, **how)
            for name, task in tasks.items()
        }
        chosen = f"{recipe.modules} modules" + ("" if recipe.choose == "draw" else f" by {recipe.choose}")
        within = "" if recipe.basis is None else f", in a basis of {recipe.basis}{WITH_CORE if recipe.core else ''}"
        few = "" if rows == TRAIN_ROWS[league] else f" over {rows} rows"
        print(f"League {league}, {recipe.epochs} epochs{few}, {chosen}{within}")
        methods = {job.method: _name(job.options) for job in of_group}
        print(describe(config, [*methods.values()], work, settings, names=[*methods], capacity=where.capacity))


def _name(options: Any) -> str:
    mixed = options.recipe.composition == "mix" and options.method in ("fusion", "coefficients")
    return f"{options.method}-mix" if mixed else options.method
