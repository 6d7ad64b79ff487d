"""Tune learning rates on real language: nine trials a method on the two tuning tasks, all in one program.

    python experiments/language_tune.py --tasks function_vectors/dataset_files
    python experiments/language_tune.py --tasks function_vectors/dataset_files --methods LoRAFusion LoRA

A trial trains as a row of the table does, but for two passes, and is scored by its loss on 100 test rows of the tuning
tasks. Bases and choices of modules have the rates of LoRAFusion. Results are rows of OUT/tune.jsonl; interrupted, the
same command goes on. What it found is in `_language.py`; OUT/table_tune.md shows it.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _common import ROOT
from _language import MAIN, MORE, TUNING, find, options_of
from language import FOLDER, LanguageOptions, link_tasks, linked_base, make_pools
from tune import TRIALS

from lorafusion_jax import cli
from lorafusion_jax.files import write_text
from lorafusion_jax.runs.prepare import prepare
from lorafusion_jax.runs.run import with_targets
from lorafusion_jax.tasks import Split, batch_orders, train_batches
from lorafusion_jax.training.fit import fit, recipe_rates, start
from lorafusion_jax.training.loss import seed_entropies
from lorafusion_jax.training.problem import LOSS
from lorafusion_jax.training.programs import make_room

SEED, PASSES = 101, 2  # the seed is not one of the table's


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Options of the script.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders.
      methods: rows of the table to tune; by default all that are trained, other than bases and choices of modules.
      adapters: folder of the pool's adapters.
      out: folder of tune.jsonl; what is there already is not run again.
    """

    tasks: Path
    methods: tuple[str, ...] = tuple(name for name in MAIN | MORE if name in TRIALS)
    adapters: Path = LanguageOptions.adapters
    out: Path = ROOT / "runs" / "language"


def main(arguments: Sequence[str] = ()) -> None:
    """Run the trials that are missing, and write the table of all."""
    options = tyro.cli(TuneOptions, args=list(arguments), description=__doc__)
    tasks = link_tasks(options.tasks)
    make_pools(options.adapters)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "tune.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for method in options.methods:
        for task in TUNING:
            if any((row["method"], row["task"]) == (method, task) for row in rows):
                continue
            make_room()
            rows.append(
                {"method": method, "task": task, "trials": _losses(method, find(task, tasks), options.adapters)}
            )
            with file.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
            write_text(options.out / "table_tune.md", table_of(rows))
            best = min(rows[-1]["trials"], key=lambda trial: trial["loss"])
            print(f"{method}, {task}: loss {best['loss']:.3f} at {best['rates']}", flush=True)


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of all trials, with an arrow at each method's lowest mean loss of both tasks."""
    lines = [f"| method | rates | {' | '.join(TUNING)} | mean loss |", "|---|---|" + "---:|" * (len(TUNING) + 1)]
    for method in dict.fromkeys(row["method"] for row in rows):
        of = {row["task"]: row["trials"] for row in rows if row["method"] == method}
        if set(of) != set(TUNING):
            continue
        losses = [[of[task][i]["loss"] for task in TUNING] for i in range(len(of[TUNING[0]]))]
        means = [fmean(pair) for pair in losses]
        for i, trial in enumerate(of[TUNING[0]]):
            rates = ", ".join(f"{name} {rate:g}" for name, rate in trial["rates"].items())
            numbers = " | ".join(f"{loss:.3f}" for loss in (*losses[i], means[i]))
            lines.append(f"| {method} | {rates} | {numbers}{' ←' if i == int(np.nanargmin(means)) else ''} |")
    return "\n".join(lines) + "\n"


def _losses(method: str, path: Path, adapters: Path) -> list[dict[str, Any]]:
    """Return the rates of every trial with its loss on the test rows, in nats per token."""
    entry, trials = (MAIN | MORE)[method], TRIALS[method]
    count = len(trials)
    options = with_targets(options_of(entry, path, base=linked_base(), pool=FOLDER / adapters.name, seeds=(SEED,)))
    options = dataclasses.replace(options, recipe=dataclasses.replace(options.recipe, epochs=PASSES))
    setup = prepare(options)
    assert setup.split is not None
    # Every trial is a seed of the program, all with the same draws.
    problem = setup.problem.replace(index=jnp.repeat(setup.problem.index, count, axis=0))
    rows = setup.rows._replace(split=Split(*(np.repeat(part, count, axis=0) for part in setup.split)))
    seeds = (SEED,) * count
    rates = recipe_rates(problem.method, options.recipe, count)
    chosen = rates.learning_rate | {
        name.removeprefix("lr_"): jnp.array([trial[name] for trial in trials], jnp.float32) for name in trials[0]
    }
    state = fit(problem, rows, start(problem, seeds), options.recipe, seeds, rates=rates._replace(learning_rate=chosen))
    everything = batch_orders(
        np.tile(np.arange(len(setup.test), dtype=np.int32), (count, 1)), batch_size=len(setup.test)
    )
    batch = next(train_batches(setup.test, everything, pad_id=setup.tokenizer.pad_token_id))
    losses = jax.device_get(seed_entropies(state.params, batch, problem.read(LOSS, 0)))
    return [{"rates": trial, "loss": float(loss)} for trial, loss in zip(trials, losses, strict=True)]


if __name__ == "__main__":
    cli.run(main)
