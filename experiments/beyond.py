"""Ideas beyond the paper on the embedded pool, each with no more row passes than plain fusion.

    python experiments/beyond.py                             # runs what is missing, then writes the reports
    python experiments/beyond.py --ideas rank prune           # some ideas only
    python experiments/beyond.py --ideas gauss-newton --tasks examples/small/tasks/double_digit --seeds 1 2

    rank           keep the modules of all 28 that one backward pass at c = 0 ranks highest, and fuse one epoch less
    start          start from that gradient, one epoch less
    penalty        L1, L2, softmax over the modules
    gauss-newton   on the coefficients only, against Adam, at equal rows passed forward and backward together
    prune          leave modules out after training

Learning rates are those that tuning found for plain fusion; the softmax's logits, which it did not tune, have two.
Results are rows of OUT/results.jsonl; interrupted, the same command goes on.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import _script
import _beyond
import tyro
from _common import ROOT, SMALL, TASKS, recipe_of
from _methods import METHODS, Entry
from report import main as report

from lorafusion_jax import PRESETS, FuseOptions
from lorafusion_jax.io.pool import open_pool
from lorafusion_jax.report import append_rows, read_rows
from lorafusion_jax.runs.evaluate import seed_rows
from lorafusion_jax.runs.matrix import check_same, settings_of
from lorafusion_jax.runs.prepare import trainable_count
from lorafusion_jax.runs.run import environment
from lorafusion_jax.runs.scoring import evaluate_seeds

Idea = Literal["rank", "start", "penalty", "gauss-newton", "prune"]

_POOL = SMALL / "adapters"
_LEAGUE = "95+5"
_FUSION, _COEFFICIENTS = "LoRAFusion", "coefficients only"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeyondOptions:
    """Options of the experiment.

    Attributes:
      tasks: task folders or files.
      ideas: ideas to run, in addition to the methods they are compared with; all by default.
      seeds: each draws modules, starts and orders of rows; all run as one program.
      epochs: of plain fusion, which sets the row passes of every idea.
      test_rows: evaluate on the first rows only.
      out: folder of results.jsonl and the reports; what is there already is not run again.
    """

    tasks: tuple[str, ...] = tuple(str(SMALL / "tasks" / name) for name in TASKS)
    ideas: tuple[Idea, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    epochs: int = PRESETS["default"].epochs
    test_rows: int | None = None
    out: Path = ROOT / "runs" / "beyond"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table and its run.

    Attributes:
      train: of `_beyond`.
      settings: its arguments.
      entry: method and rates.
      recipe: what differs from the entry's recipe.
    """

    train: Callable[..., _beyond.Trained] = _beyond.plain
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    entry: Entry = METHODS[_FUSION]
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)


def variants(ideas: Sequence[Idea]) -> dict[str, Variant]:
    """Return what is to be run, by name: plain runs to compare with, then the ideas, all where none is given."""
    plain, every = Variant(), len(open_pool(_POOL).names)
    coefficients = METHODS[_COEFFICIENTS]
    softmax = Variant(train=_beyond.softmax)
    found: dict[Idea, dict[str, Variant]] = {
        # First, since pruned runs share the training of the run before.
        "prune": {_FUSION: plain}
        | {f"pruned to {keep}": Variant(train=_beyond.pruned, settings={"keep": keep}) for keep in (15, 10, 5)},
        "rank": {_FUSION: plain, f"all {every} modules": Variant(recipe={"modules": every})}
        # What fewer modules come to that are drawn.
        | {f"{keep} drawn modules": Variant(recipe={"modules": keep}) for keep in (5, 10)}
        | {
            f"best {keep} by {name}": Variant(
                train=_beyond.ranked, settings={"keep": keep, "by": by}, recipe={"modules": every}
            )
            for by, name in (("module", "gradient"), ("block", "|gradient| of blocks"))
            for keep in (5, 10, 20)
        },
        "start": {_FUSION: plain, "gradient start": Variant(train=_beyond.gradient_start)},
        "penalty": {_FUSION: plain}
        | {f"L1 {weight:g}": Variant(recipe={"l1": weight}) for weight in (5e-4, 5e-3)}
        | {f"L2 {weight:g}": Variant(recipe={"l2": weight}) for weight in (1e-5, 1e-3)}
        | {
            f"softmax, rate {rate:g}": dataclasses.replace(softmax, recipe={"lr_coefficients": rate})
            for rate in (0.1, 1.0)
        },
        "gauss-newton": {_COEFFICIENTS: Variant(entry=coefficients)}
        | {
            f"Gauss-Newton, {iterations} CG": Variant(
                train=_beyond.gauss_newton, settings={"iterations": iterations, "damping": 0.01}, entry=coefficients
            )
            for iterations in (2, 5)
        },
    }
    return {name: of[name] for idea, of in found.items() if not ideas or idea in ideas for name in of}


def run(options: BeyondOptions) -> Path:
    """Run what is missing, and return the file of rows.

    Raises:
      ValueError: no task or seed; the file holds rows of other settings; and as `prepare` does.
    """
    if not options.tasks or not options.seeds:
        raise ValueError("no task or no seed: give at least one of each with --tasks and --seeds")
    file = options.out / "results.jsonl"
    have = {(row["task"], row["method"], row["seed"]): row for row in (read_rows(file) if file.exists() else [])}
    jobs = [(Path(task), *pair) for task in options.tasks for pair in variants(options.ideas).items()]
    began = time.perf_counter()
    for number, (task, name, variant) in enumerate(jobs, start=1):
        missing = tuple(seed for seed in options.seeds if (task.stem, name, seed) not in have)
        wanted = _fuse_options(options, task, variant, options.seeds)
        for seed in set(options.seeds) - set(missing):
            was = have[task.stem, name, seed]["config"]
            where = f"{file}: {task.stem}, {name}, seed {seed}"
            check_same(was, wanted, where, root=ROOT, beyond=_idea(variant))
        if not missing:
            continue
        rows = list(_rows(_fuse_options(options, task, variant, missing), variant, task.stem, name))
        append_rows(file, rows)
        said = f"{sum(row['exact_match'] for row in rows) / len(rows):.1f} %"
        minutes = (time.perf_counter() - began) / 60
        progress = f"[{number}/{len(jobs)}] {task.stem}, {name}: {said}, {minutes:.1f} min"
        print(progress, file=sys.stderr, flush=True)
    return file


def _fuse_options(options: BeyondOptions, task: Path, variant: Variant, seeds: tuple[int, ...]) -> FuseOptions:
    recipe = dataclasses.replace(recipe_of(variant.entry), **variant.recipe, epochs=options.epochs)
    return FuseOptions(
        base=str(SMALL / "base"),
        pool=str(_POOL),
        task=str(task),
        seeds=seeds,
        method=variant.entry.method,
        recipe=recipe,
        test_rows=options.test_rows,
    )


def _rows(options: FuseOptions, variant: Variant, task: str, method: str) -> Iterator[dict[str, Any]]:
    """Train and evaluate one method on one task, and yield a row for each seed."""
    trained = variant.train(options, **variant.settings)
    seeds, found = evaluate_seeds(trained.setup, options, trained.params)
    shared = {
        "task": task,
        "method": method,
        "league": _LEAGUE,
        "trainable": sum(trainable_count(trained.setup).values()),
        "steps": trained.steps,
        "forward_rows": trained.forward_rows,
        "backward_rows": trained.backward_rows,
        "seconds": trained.seconds / len(seeds),
        "config": settings_of(options, ROOT) | {"beyond": _idea(variant)},
        "data_sha256": trained.setup.task.sha256,
        **environment(),
    }
    for i, row in enumerate(seed_rows(seeds, found)):
        options_correct = None if found.option_correct is None else _marks(found.option_correct[i])
        yield shared | {"correct": _marks(found.correct[i]), "option_correct": options_correct, **row}


def _marks(right: Any) -> str:
    return "".join("01"[int(one)] for one in right)


def _idea(variant: Variant) -> dict[str, Any]:
    """Return the settings of a row other than the options of a run and its seed."""
    return {"train": variant.train.__name__, **variant.settings}


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(BeyondOptions, args=list(arguments), description=__doc__)
    file = run(options)
    # Each idea against its own reference; Gauss-Newton trains the coefficients only.
    there = {row["method"] for row in read_rows(file)}
    for reference, folder in ((_FUSION, "report"), (_COEFFICIENTS, "report_coefficients")):
        if reference in there:
            out = str(options.out / folder)
            title = f"Beyond the paper, against {reference}"
            report([str(file), "--out", out, "--title", title, "--reference", reference])


if __name__ == "__main__":
    _script.run(main)
