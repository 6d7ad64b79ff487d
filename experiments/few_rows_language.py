"""Better use of few rows on language: chosen modules, and examples in every prompt; six tuning tasks of SmolLM2.

    python experiments/few_rows_language.py --tasks FOLDER             # what is missing, then a table of the ideas
    python experiments/few_rows_language.py --tasks FOLDER --by 3 0.333

FOLDER, pool, rows and rates are those of experiments/pool_value_language.py, and the design is an addition of
experiments/pool_value.md. Written to OUT: a line of few_rows_language.jsonl for each idea, task, seed and rate, and
few_rows_language.csv. Interrupted, the same command continues.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _script
import numpy as np
import tyro
from lab.common import ROOT, append_line, read_lines, write_csv
from lab.language import (
    MOST_SHARED,
    SOURCES,
    TRAIN_ROWS,
    TUNING,
    find,
    load,
    shares,
    test_losses,
    trained_pairs,
    unseen,
)
from lab.smollm2 import base
from lab.tasks import find_task
from pool_value_language import ARMS, DRAW, EPOCHS, FUSION, Lab, draw, recipe_for, setup_of, tune

from lorafusion_jax.report.statistics import over_tasks
from lorafusion_jax.runs.descent import gradient_at_zero
from lorafusion_jax.tasks import draw_modules, load_task
from lorafusion_jax.text_tables import markdown
from lorafusion_jax.training.fit import fit, start

ROWS, FEW, SHOTS, SEEDS, BATCH, MORE = 20, 10, 5, (1, 2), 10, 4
PLAIN, BEST, DRAWN, SHOWN = (
    "24 modules",
    "10 modules of greatest descent",
    "10 modules drawn",
    "5 examples in every prompt",
)
IDEAS = (PLAIN, BEST, DRAWN, SHOWN)
# Neither targets nor sources.
OTHERS = (
    "alphabetically_first_3",
    "choose_last_of_5",
    "choose_middle_of_3",
    "choose_middle_of_5",
    "color_v_animal_3",
    "lowercase_last_letter",
    "object_v_concept_3",
    "present-past",
    "verb_v_adjective_3",
    "word_length",
)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders.
      pool: folder of the 24 adapters.
      by: factors of the coefficients' rate.
      out: folder of results and of the tuning; cells that are there are not measured again.
    """

    tasks: Path
    pool: Path = ROOT / "runs" / "language_own" / "adapters"
    by: tuple[float, ...] = (1.0,)
    out: Path = ROOT / "docs" / "results" / "pool_value"


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and print the ideas against all modules."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    clean = ROOT / "runs" / "pool_value" / "language"
    drawn, _ = draw(options.tasks, clean)
    paths = {name: drawn[name] for name in TUNING} | more(options.tasks, clean)
    lab, file = Lab(base(), options.pool), options.out / "few_rows_language.jsonl"
    rates = tune(lab, FUSION, ROWS, drawn, options.out / "language_tune.jsonl")
    have = {(row["by"], row["seed"], row["task"], row["idea"]) for row in read_lines(file)}
    everything = itertools.product(options.by, SEEDS, paths, IDEAS)
    for by, seed, task, idea in sorted(everything, key=lambda key: key[3] == SHOWN):  # which takes the longest
        if (by, seed, task, idea) in have:
            continue
        began = time.process_time()
        own = rates | {"lr_coefficients": float(f"{rates['lr_coefficients'] * by:.3g}")}
        loss = measure(lab, idea, paths[task], seed, own)
        key = {"idea": idea, "task": task, "seed": seed, "by": by, "rates": own}
        append_line(file, key | {"test_loss": round(loss, 5)})
        spent = time.process_time() - began
        print(f"{idea}, {task}, seed {seed}, rate times {by}: {spent:.0f} CPU s", file=sys.stderr, flush=True)
    lines = table(read_lines(file))
    write_csv(options.out / "few_rows_language.csv", lines)
    print(markdown(lines))


def more(tasks: Path, clean: Path) -> dict[str, Path]:
    """Return the paths of four more tuning tasks, in the order of the draw, without leaked test pairs."""
    trained = trained_pairs([name for family in SOURCES.values() for name in family], tasks)
    paths: dict[str, Path] = {}
    for name in np.random.default_rng(DRAW).permutation(OTHERS).tolist():
        of_sources = shares(load_task(find_task(tasks, name), train_rows=TRAIN_ROWS), trained)
        if max(of_sources.values()) <= MOST_SHARED and len(paths) < MORE:
            paths[name] = unseen(find(name, tasks), trained, clean).path
    return paths


def measure(lab: Lab, idea: str, path: Path, seed: int, rates: Mapping[str, float]) -> float:
    """Return the test loss of LoRAFusion with an idea, trained on a seed's rows of a task."""
    model = lab.model(FUSION, 0)
    setup = setup_of(model, load(path), ROWS, seed, SHOTS if idea == SHOWN else 0)
    chosen = np.arange(len(model.modules[0]))
    if idea == DRAWN:
        chosen = np.array([model.modules[0].index(name) for name in draw_modules(model.modules[0], FEW, seed)])
    elif idea == BEST:
        _, gradient = gradient_at_zero(setup.problem, (seed,), list(setup.rows.once(BATCH)))
        chosen = np.argsort(gradient[0].sum(axis=1), kind="stable")[:FEW]
    # The ranking is a pass over the training rows: one epoch less.
    recipe = dataclasses.replace(recipe_for(ARMS[FUSION], ROWS), epochs=EPOCHS[ROWS] - (idea == BEST), **rates)
    setup = setup.with_problem(index=setup.problem.index[:, chosen])
    state = fit(setup.problem, setup.rows, start(setup.problem, (seed,)), recipe, (seed,))
    return test_losses(setup, state.best)[0]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return each idea at its best rate, and its loss minus that of all modules, paired by task."""
    tasks = {row["task"] for row in rows}
    best: dict[str, tuple[float, float, dict[str, float]]] = {}
    for idea, by in itertools.product(IDEAS, sorted({row["by"] for row in rows})):
        own = [row for row in rows if (row["idea"], row["by"]) == (idea, by)]
        if len(own) == len(SEEDS) * (len(TUNING) + MORE):
            losses = {task: float(np.mean([row["test_loss"] for row in own if row["task"] == task])) for task in tasks}
            best[idea] = min(best.get(idea, (np.inf,)), (float(np.mean([*losses.values()])), by, losses))
    lines = [["idea", "coefficients' rate times", "test loss", "minus 24 modules", "95 % interval"]]
    for idea, (mean, by, losses) in best.items():
        differences = [losses[task] - best[PLAIN][2][task] for task in losses]
        ends = over_tasks(differences)
        shown = "-" if idea == PLAIN or ends is None else f"{ends.low:.3f} to {ends.high:.3f}"
        lines.append([idea, f"{by:g}", f"{mean:.3f}", f"{np.mean(differences):.3f}", shown])
    return lines


if __name__ == "__main__":
    _script.run(main)
