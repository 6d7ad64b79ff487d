"""Plan of a matrix: its runs and their cost, printed without running or loading weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..estimates.estimate import Settings
from ..estimates.machines import machine, pace, spent
from ..estimates.params import shape_config
from ..estimates.plan import describe, plan, pool_shape, workloads
from ..methods.fusion import choice_of
from ..methods.recipes import basis_of, modules_of
from ..methods.untrained import FewShotRecipe
from .jobs import Job
from .matrix import TRAIN_ROWS, Arm, MatrixOptions, jobs


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
