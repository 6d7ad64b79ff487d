"""Better use of few rows: chosen modules, and numbers shrunk toward those of the pool's own tasks; six tuning tasks.

    python experiments/few_rows.py                 # what is missing, then a table of the ideas
    python experiments/few_rows.py --rows 5

Base, tuning tasks, pool and rates are those of experiments/pool_value.py, and the design is the last addition of
experiments/pool_value.md. Written to OUT: a line of few_rows.jsonl for each idea, task, seed and rate, and
few_rows.csv. Interrupted, the same command continues.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _script
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from lab.common import ROOT, SMALL, append_line, read_lines, write_csv
from lab.pool_cells import ARMS, EPOCHS, FUSION, SEEDS, Lab, recipe_for
from lab.string_pools import TRAIN_ROWS, VALIDATION_ROWS, Target, design, pool_folder, write_pools
from pool_value import TUNING_SEEDS, rates_at

import lorafusion_jax as lf
from lorafusion_jax.io.pool import open_pool
from lorafusion_jax.report.statistics import over_tasks
from lorafusion_jax.runs.descent import gradient_at_zero
from lorafusion_jax.tasks import Batch
from lorafusion_jax.text_tables import markdown
from lorafusion_jax.training.loss import seed_entropies

FEW = 10  # modules
SHARES = (0.25, 0.5, 0.75)  # of the distance from the mean of the pool's own tasks
PLAIN, BEST, DRAWN = "20 modules drawn", "10 modules of greatest descent", "10 modules drawn"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      rows: numbers of training rows.
      tuned: folder of the rates that experiments/pool_value.py tried.
      pools: folder of its pools; missing ones are trained.
      out: folder of results; cells that are there are not measured again.
    """

    rows: tuple[int, ...] = (5, 20)
    tuned: Path = ROOT / "docs" / "results" / "pool_value"
    pools: Path = ROOT / "runs" / "pool_value" / "pools"
    out: Path = ROOT / "docs" / "results" / "pool_value"


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and print the ideas against 20 drawn modules."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    write_pools(options.pools, shuffled=False)
    file, ideas = options.out / "few_rows.jsonl", Ideas(options)
    for number in options.rows:
        have = {(row["idea"], row["task"], *row["point"]) for row in read_lines(file) if row["rows"] == number}
        for target in TARGETS:
            for point in ideas.points(number):
                for idea in (PLAIN, DRAWN, BEST):
                    if (idea, target.task.name, *point) not in have:
                        for name, losses in ideas.losses(idea, target, number, point).items():
                            key = {"idea": name, "task": target.task.name, "rows": number, "point": point}
                            append_line(file, key | {"test_losses": np.round(losses, 5).tolist()})
                        print(f"{number} rows, {target.task.name}, {point}, {idea}", file=sys.stderr, flush=True)
    lines = table(read_lines(file))
    write_csv(options.out / "few_rows.csv", lines)
    print(markdown(lines))


TARGETS = [target for target in design().targets if target.pool == "tuning"]


class Ideas:
    """The lab, the best rates of LoRAFusion, and the mean numbers of fusions for the pool's own tasks."""

    def __init__(self, options: Options):
        self.lab = Lab(options.pools)
        self.tuned = [line for line in read_lines(options.tuned / "tune.jsonl") if line["arm"] == FUSION]
        folder = pool_folder(options.pools, "tuning", shuffled=False)
        self.names = open_pool(folder, str(SMALL / "base")).load().names
        self.means: dict[int, Any] = {}

    def points(self, rows: int) -> Iterator[tuple[int, ...]]:
        """Yield the best point of the grid of rates, and those around it."""
        best = self.best(rows)
        for by in itertools.product((0, -1, 1), repeat=len(best)):
            yield tuple(map(sum, zip(best, by, strict=True)))

    def best(self, rows: int) -> tuple[int, ...]:
        by_point: dict[tuple[int, ...], list[float]] = {}
        for line in self.tuned:
            if line["rows"] == rows:
                by_point.setdefault(tuple(line["point"]), []).append(line["test_loss"])
        return min(by_point, key=lambda point: float(np.mean(by_point[point])))

    def losses(self, idea: str, target: Target, rows: int, point: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the test losses of the seeds with an idea; at the best rates also with shrunk numbers."""
        problem = self.lab.problem(FUSION, target.pool, 0)
        tokens, test, _ = self.lab.tokens(target.task)
        index = np.asarray(problem.index)
        if idea == DRAWN:
            index = index[:, :FEW]
        elif idea == BEST:
            index = self.ranked(problem, tokens, rows)[:, :FEW]
        # The ranking is a pass over the training rows: one epoch less.
        recipe = dataclasses.replace(recipe_for(ARMS[FUSION], rows), epochs=EPOCHS[rows] - (idea == BEST))
        problem = problem.replace(index=jnp.asarray(index))
        params, _ = self.lab.fit(problem, tokens, recipe, rows, self.entries(point))
        for_all = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (len(SEEDS), *leaf.shape)), test)
        found = {idea: np.asarray(seed_entropies(params, for_all, problem))}
        if idea == PLAIN and tuple(point) == self.best(rows):
            centre = self.centre(rows, point, index)
            for share in SHARES:
                shrunk = jax.tree.map(lambda own, mean, share=share: mean + share * (own - mean), params, centre)
                found[f"{share} of the way from the mean"] = np.asarray(seed_entropies(shrunk, for_all, problem))
        return {name: losses[: len(TUNING_SEEDS)] for name, losses in found.items()}

    def entries(self, point: Sequence[int]) -> list[tuple[int, Mapping[str, float]]]:
        return [(seed, rates_at(ARMS[FUSION], tuple(point))) for seed in SEEDS]

    def ranked(self, problem: lf.Problem, tokens: Any, rows: int) -> np.ndarray:
        """Return all modules of the pool for each seed, the one of greatest descent on its training rows first."""
        everything = np.broadcast_to(np.arange(len(self.names), dtype=np.int32), (len(SEEDS), len(self.names)))
        own = np.arange(len(SEEDS))[:, None] * (TRAIN_ROWS + VALIDATION_ROWS) + np.arange(rows)
        texts = ([part[i] for i in own.ravel()] for part in (tokens.inputs, tokens.labels))
        batch: Batch = self.lab.batch(*texts)
        by_seed = jax.tree.map(lambda leaf: leaf.reshape(len(SEEDS), rows, *leaf.shape[1:]), batch)
        problem = problem.replace(index=jnp.asarray(everything))
        _, gradient = gradient_at_zero(problem, SEEDS, [by_seed])
        return np.argsort(np.sum(gradient, axis=tuple(range(2, gradient.ndim))), axis=1, kind="stable").astype(np.int32)

    def centre(self, rows: int, point: Sequence[int], index: np.ndarray) -> Any:
        """Return the mean numbers for the modules of each seed."""
        if rows not in self.means:
            self.means = {rows: self.mean(rows, point)}
        coefficients, others = self.means[rows]
        own = {name: jax.tree.map(lambda leaf: leaf[None], part) for name, part in others.items()}
        return own | {"coefficients": coefficients[index]}

    def mean(self, rows: int, point: Sequence[int]) -> tuple[Any, Any]:
        """Return the mean coefficients of each module, and the mean of all other numbers, over the pool's own tasks.

        A task is fused from 20 other modules than its own, which would be chosen alone.
        """
        problem = self.lab.problem(FUSION, "tuning", 0)
        recipe, modules = recipe_for(ARMS[FUSION], rows), len(self.names)
        total, count, others = 0.0, np.zeros(modules), []
        for task in design().pools["tuning"]:
            without = [n for n, name in enumerate(self.names) if name != task.name]
            draws = [np.random.default_rng(seed).permutation(without)[:20] for seed in SEEDS]
            index = np.array(draws, np.int32)
            tokens = self.lab.tokens(task)[0]
            params, _ = self.lab.fit(
                problem.replace(index=jnp.asarray(index)), tokens, recipe, rows, self.entries(point)
            )
            coefficients = np.asarray(params["coefficients"])
            sums = np.zeros((modules, *coefficients.shape[2:]))
            np.add.at(sums, index, coefficients)
            total = total + sums
            np.add.at(count, index, 1)
            rest = {name: part for name, part in params.items() if name != "coefficients"}
            others.append(jax.tree.map(lambda leaf: np.mean(np.asarray(leaf), axis=0), rest))
        mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *others)
        of_module = np.asarray(total) / count.reshape(-1, *[1] * (np.ndim(total) - 1))
        return of_module.astype(np.float32), mean


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return each idea at its best rates, and its loss minus that of 20 drawn modules, paired by task."""
    lines = [["rows", "idea", "test loss", "minus 20 drawn", "95 % interval"]]
    for number in sorted({row["rows"] for row in rows}):
        by_idea: dict[str, dict[tuple[int, ...], dict[str, float]]] = {}
        for row in rows:
            if row["rows"] == number:
                of_idea = by_idea.setdefault(row["idea"], {})
                of_idea.setdefault(tuple(row["point"]), {})[row["task"]] = float(np.mean(row["test_losses"]))
        best = {
            idea: min((losses for losses in points.values() if len(losses) == len(TARGETS)), key=_mean, default=None)
            for idea, points in by_idea.items()
        }
        if (plain := best.get(PLAIN)) is None:
            continue
        for idea, losses in best.items():
            if losses is not None:
                differences = [losses[task] - plain[task] for task in plain]
                ends = over_tasks(differences)
                shown = "-" if idea == PLAIN or ends is None else f"{ends.low:.3f} to {ends.high:.3f}"
                lines.append([str(number), idea, f"{_mean(losses):.3f}", f"{np.mean(differences):.3f}", shown])
    return lines


def _mean(losses: Mapping[str, float]) -> float:
    return float(np.mean([*losses.values()]))


if __name__ == "__main__":
    _script.run(main)
