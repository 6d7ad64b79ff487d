"""Plan of a matrix: its runs and their cost, printed without running or loading weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafusion_jax import CoefficientsRecipe, FewShotRecipe, Recipe
from lorafusion_jax.methods import WITH_CORE, basis_of, choice_of, modules_of
from lorafusion_jax.parts import (
    Settings,
    describe,
    known_shapes,
    load_texts,
    machine,
    packing_of,
    pool_shape,
    shape_config,
    workload,
)
from lorafusion_jax.tasks import load_task

from .common import TRAIN_ROWS
from .jobs import Job
from .matrix import MatrixOptions, jobs
from .methods import Entry


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
        recipe = job.options.recipe
        # Methods without a pool are planned next to those that fuse the matrix' number of modules.
        fused = (modules_of(recipe) or options.modules, choice_of(recipe), basis_of(recipe), _has_core(recipe))
        work = (recipe.epochs, recipe.batch_size, recipe.max_new_tokens)
        groups.setdefault((job.league, job.options.train_rows, job.options.load_in, fused, work), []).append(job)
    for (league, rows, load_in, (modules, choose, basis, core), (epochs, *_)), of_group in groups.items():
        tasks = {job.task: job.options.task for job in of_group}
        of_method = {job.method: job.options for job in of_group}
        recipes = [options.recipe for options in of_method.values()]
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
        packing = packing_of(config, on_cpu=where.device == "cpu")
        how: dict[str, Any] = {"packing": packing, "train_rows": rows, "test_rows": options.test_rows}
        if options.base not in known_shapes():
            how |= load_texts(of_group[0].options)._asdict()
        prompted = next((recipe for recipe in recipes if isinstance(recipe, FewShotRecipe)), recipes[0])
        read = {name: load_task(task, prompt=options.prompt, chat=options.chat) for name, task in tasks.items()}
        work = {name: workload(task, prompted, eval_batch=options.eval_batch, **how) for name, task in read.items()}
        chosen = f"{modules} modules" + ("" if choose == "draw" else f" by {choose}")
        within = "" if basis is None else f", in a basis of {basis}{WITH_CORE if core else ''}"
        few = "" if rows == TRAIN_ROWS[league] else f" over {rows} rows"
        print(f"League {league}, {epochs} epochs{few}, {chosen}{within}")
        methods = [options.method for options in of_method.values()]
        shown: Any = {"names": [*of_method], "recipes": recipes, "capacity": where.capacity}
        print(describe(config, methods, work, settings, **shown))


def _has_core(recipe: Recipe) -> bool:
    return isinstance(recipe, CoefficientsRecipe) and recipe.train_core
