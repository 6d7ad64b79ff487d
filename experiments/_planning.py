"""Plan of a matrix: its runs and their cost, printed without running or loading weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _common import TRAIN_ROWS
from _matrix import MatrixOptions, jobs
from _methods import Entry

from lorafusion_jax import read_config
from lorafusion_jax.crossbar.platform import for_cpu
from lorafusion_jax.estimates.estimate import Settings
from lorafusion_jax.estimates.plan import describe, pool_shape
from lorafusion_jax.estimates.workload import workload
from lorafusion_jax.models.families import known_shapes
from lorafusion_jax.runs.matrix import Job
from lorafusion_jax.runs.prepare import load_texts
from lorafusion_jax.tasks import load_task
from lorafusion_jax.training.seeds import default_path


def print_matrix_plan(options: MatrixOptions, entries: Mapping[str, Entry]) -> None:
    """Print what the programs of a matrix compute and hold: a table for each choice of modules and each basis.

    The base may be the name of a shape, such as flan-t5-large: lengths are then estimated from characters, and a pool
    that is not there counts as one of rank 16 on q and v.

    Raises:
      ValueError: as `run_matrix` does.
    """
    shaped = options.base in known_shapes()
    config = known_shapes()[options.base] if shaped else read_config(options.base)
    pool = Path(options.pool)
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs(options, entries, check_pool=pool.is_dir()):
        recipe = job.options.recipe
        of_rows = job.league, job.options.train_rows, recipe.epochs
        groups.setdefault((*of_rows, recipe.modules, recipe.choose, recipe.basis), []).append(job)
    for (league, rows, epochs, modules, choose, basis), of_group in groups.items():
        recipe, tasks = of_group[0].options.recipe, {job.task: job.options.task for job in of_group}
        rank, size, targets = pool_shape(pool, basis)
        settings = Settings(
            recipe=recipe,
            rank=rank,
            targets=targets,
            # Those that any seed draws: at most as many as all of them together.
            pool=min(len(options.seeds) * modules, size) if choose == "draw" else size,
            seeds=len(options.seeds),
            path=default_path(),
            device="cpu" if for_cpu() else "accelerator",
        )
        how: dict[str, Any] = {"train_rows": rows, "test_rows": options.test_rows}
        if not shaped:
            how |= load_texts(of_group[0].options)._asdict()
        work = {
            name: workload(load_task(task), recipe, eval_batch=options.eval_batch, **how)
            for name, task in tasks.items()
        }
        chosen = f"{modules} modules" if choose == "draw" else f"{modules} modules by {choose}"
        within = "" if basis is None else f", in a basis of {basis}"
        few = "" if rows == TRAIN_ROWS[league] else f" over {rows} rows"
        print(f"League {league}, {epochs} epochs{few}, {chosen}{within}")
        print(describe(config, list(dict.fromkeys(_name(job.options) for job in of_group)), work, settings))


def _name(options: Any) -> str:
    mixed = options.recipe.composition == "mix" and options.method in ("fusion", "coefficients")
    return f"{options.method}-mix" if mixed else options.method
