"""Recipes of any method, options with one, and runs on the cut base and pool, which files so compile once."""

import one_block

from lorafusion_jax import FuseOptions, runs
from lorafusion_jax.methods import METHODS, fields_of, recipe_of
from lorafusion_jax.runs import RunFolder, options_to_json, run_path

TASK = one_block.SMALL / "tasks" / "double_digit"
_NUMBERS = {name for entry in METHODS.values() for name in fields_of(entry)}
_QUICK = {
    "epochs": 2,
    "batch_size": 48,
    "modules": 2,
    "max_new_tokens": 8,
    "lora_rank": 4,
    "vera_rank": 8,
}


def recipe(method="fusion", **numbers):
    """The recipe of a method with those of the numbers that it has."""
    return recipe_of(METHODS[method].recipe, numbers)


def options(numbers, **values):
    """Options of a run, whose recipe is of those of the numbers that its method has; values may be numbers too."""
    numbers = numbers | {
        name: values.pop(name) for name in [*values] if name in _NUMBERS
    }
    return FuseOptions(
        **values, recipe=recipe(values.get("method", "fusion"), **numbers)
    )


def small_run(small, out, **changes):
    """Options of a short run on a base and a pool, such as those of the fixture `small`."""
    base, pool = map(str, small)
    values = {
        "base": base,
        "pool": pool,
        "task": str(TASK),
        "seeds": (1, 2),
        "out": out,
        "test_rows": 5,
    }
    return options(_QUICK, **values | changes)


def run_config(options, **changes):
    """The contents of the `config.json` of a run that is made up."""
    environment = {
        "seed_mode": "sequential",
        "unroll": False,
        "dtype": "float32",
        "device": "cpu",
        "cores": 1,
    }
    config = {
        "options": options_to_json(options),
        "modules": [[]],
        "task_sha256": "",
        "trained_sha256": [],
    }
    config |= {
        "max_new_tokens": 8,
        "environment": environment | {"versions": {"lorafusion-jax": "0.1"}},
    }
    return config | {"digests": {"base": "", "modules": {}}, "folders": {}} | changes


def answers(run, seed):
    """What a seed of a run answered to the test rows."""
    return [
        row["prediction"]
        for row in RunFolder(run_path(run)).predictions()
        if row["seed"] == seed
    ]


def evaluate(**options):
    """The scores of a run's seeds; arguments are those of `EvaluateOptions`."""
    return runs.evaluate_run(runs.EvaluateOptions(**options))


def generate(**options):
    """Answers; arguments are those of `GenerateOptions`."""
    return runs.generate_lines(runs.GenerateOptions(**options))


def export(**options):
    """Write an export; arguments are those of `ExportOptions`."""
    return runs.export(runs.ExportOptions(**options))
