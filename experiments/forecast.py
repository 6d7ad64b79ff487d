"""Does the descent at zero coefficients predict a pool's advantage? A fit on half of the string tasks.

    python experiments/forecast.py                      # missing descents, then fit, test, tables and figure
    python experiments/forecast.py --package            # also writes the fit that `lorafusion forecast` uses
    python experiments/forecast.py --tasks FOLDER       # also missing descents on language

The advantages and the pools are those of experiments/pool_value.py and pool_value_language.py; FOLDER holds the
function-vector data sets. Written to OUT: a line of descents.jsonl or language_descents.jsonl for each target, seed and
number of rows, a line of cases.jsonl or language_cases.jsonl for each target, tables as CSV, and forecast.png.
Interrupted, the same command continues.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import _script
import jax
import numpy as np
import scipy.stats
import tyro
from lab.common import ROOT, SMALL, write_tables
from lab.language import TUNING, load
from lab.pool_cells import FUSION, ROTATED, SEEDS
from lab.smollm2 import base as smollm2
from lab.string_pools import CLASSES, design, pool_folder, train_rows
from pool_value_language import SEEDS as LANGUAGE_SEEDS
from pool_value_language import draw, setup_of

import lorafusion_jax as lf
from lorafusion_jax import Problem
from lorafusion_jax.parts import (
    FEATURES,
    Case,
    Feature,
    LoadedModel,
    Prediction,
    descent_of,
    fit_advantage,
    load_model,
    open_base,
    with_copies,
)
from lorafusion_jax.report import colour, plot, write_text
from lorafusion_jax.tasks import Encoded, Example, encode, eval_batches
from lorafusion_jax.trials import Cells, read_lines

SEED, DRAWS, BATCH, RESAMPLES = 20261128, 3, 10, 10_000
LANGUAGE_ROWS = 20
MODELS: dict[str, tuple[Feature, ...]] = {
    "gradient norm, loss and rows": FEATURES,
    "loss and rows": ("loss", "log_rows"),
}
JUDGED = ("rank correlation", "its 95 % interval", "in the 80 % interval", "error", "error of the mean")
PACKAGED = ROOT / "lorafusion_jax" / "runs" / "advantage.json"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the fit.

    Attributes:
      rows: numbers of training rows.
      measured: folder of the advantages.
      pools: folder of the trained pools.
      out: folder of results; descents that are there are not computed again.
      tasks: folder of the function-vector data sets; None for the language descents that are there.
      language_pool: folder of the adapters of SmolLM2.
      package: write the tasks of the fit into the package.
    """

    rows: tuple[int, ...] = (20,)
    measured: Path = ROOT / "results" / "pool_value"
    pools: Path = ROOT / "runs" / "pool_value" / "pools"
    out: Path = ROOT / "results" / "forecast"
    tasks: Path | None = None
    language_pool: Path = ROOT / "runs" / "language_own" / "adapters"
    package: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(arguments: Sequence[str] = ()) -> None:
    """Compute the missing descents, fit one half of the tasks, and test on the other."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "descents.jsonl"
    compute(options, file)
    language = options.out / "language_descents.jsonl"
    if options.tasks is not None:
        compute_language(options, options.tasks, language)
    rows = [row for number in options.rows for row in read_lines(options.measured / f"rows_{number}.jsonl")]
    cases = cases_of(read_lines(file), advantages(rows))
    if len({case["task"] for case in cases}) < 8:
        raise ValueError(f"{options.measured} has the advantages of too few tasks: run experiments/pool_value.py first")
    gains = advantages(read_lines(options.measured / "language.jsonl"), LANGUAGE_SEEDS)
    on_language = cases_of(read_lines(language), gains)
    if len(on_language) < 4:
        raise ValueError(f"{language} has the descents of too few tasks: give --tasks")
    for name, own in (("cases", cases), ("language_cases", on_language)):
        write_text(options.out / f"{name}.jsonl", "".join(json.dumps(case) + "\n" for case in own))
    relevance = {target.task.name: target.relevance for target in design().targets}
    tables = {"table": evaluated(cases), "features": explained(cases, relevance, on_language)}
    write_tables(options.out, tables | {"language": of_language(cases, on_language)})
    plot_cases(cases, options.out / "forecast.png")
    if options.package:
        source = {"base": "examples/small/base", "script": "experiments/forecast.py"}
        content = source | {"base_sha256": open_base(SMALL / "base").digest, "cases": halves(cases)[0]}
        write_text(PACKAGED, json.dumps(content, indent=1) + "\n")


def compute(options: Options, file: Path) -> None:
    """Append the descents that are missing in a file."""
    targets = {target.task.name: target for target in design().targets if target.pool != "tuning"}

    def measure(missing: Sequence[tuple[str, int, int]]) -> Iterator[Row]:
        for pool, own in itertools.groupby(missing, key=lambda key: targets[key[0]].pool):
            folder = pool_folder(options.pools, pool, shuffled=False)
            yield from of_pool(folder, [(targets[task], *rest) for task, *rest in own])

    cells = Cells(file, lambda row: (row["task"], row["rows"], row["seed"]))
    together = sorted(targets, key=lambda task: targets[task].pool)
    cells.fill(itertools.product(together, options.rows, SEEDS), measure, lambda row: f"{cells.key_of(row)}")


def of_pool(folder: Path, missing: Sequence[tuple[Any, ...]]) -> Iterator[Row]:
    """Yield the descents of one pool's modules on the training rows of targets, numbers of rows and seeds."""
    model, problems = ranked(SMALL / "base", folder)
    for target, number, seed in missing:
        texts = [Example(row["context"], row["completion"]) for row in train_rows(target.task, seed)[:number]]
        rows = encode(model.tokenizer, texts, model.text_format)
        key = {"task": target.task.name, "pool": target.pool, "relevance": target.relevance}
        yield key | {"seed": seed} | measured(model, problems, rows)


def compute_language(options: Options, tasks: Path, file: Path) -> None:
    """Append the descents on language that are missing in a file."""
    paths, _ = draw(tasks, ROOT / "runs" / "pool_value" / "language")

    def measure(missing: Sequence[tuple[str, int]]) -> Iterator[Row]:
        model, problems = ranked(smollm2(), options.language_pool)
        for task, seed in missing:
            own = setup_of(model, load(paths[task]), LANGUAGE_ROWS, seed, 0).train
            rows = Encoded(own.inputs[:LANGUAGE_ROWS], own.labels[:LANGUAGE_ROWS])
            yield {"task": task, "seed": seed} | measured(model, problems, rows)

    cells = Cells(file, lambda row: (row["task"], row["seed"]))
    keys = itertools.product((name for name in paths if name not in TUNING), LANGUAGE_SEEDS)
    cells.fill(keys, measure, lambda row: f"{cells.key_of(row)}")


def ranked(base: Path, pool: Path) -> tuple[LoadedModel, list[Problem]]:
    """Return a base with all modules of a pool, and the problems of these and of their rotated copies."""
    recipe = lf.CoefficientsRecipe(choose="gradient", modules=1)
    model = load_model(lf.FuseOptions(base=str(base), pool=str(pool), task="", method="coefficients", recipe=recipe))
    return model, with_copies(model.problem.replace(index=model.problem.index[0]), jax.random.key(SEED), DRAWS)


def measured(model: LoadedModel, problems: Sequence[Problem], rows: Encoded) -> Row:
    """Return the descents of modules and copies on some rows."""
    batches = eval_batches(rows, BATCH, pad_id=model.tokenizer.pad_token_id)
    found = descent_of(problems, [batch for _, batch in batches])
    numbers = {"loss": found.loss, "log_ratio": found.log_ratio, "modules": found.modules, "rotated": found.rotated}
    return {"rows": found.rows} | {name: np.round(value, 5).tolist() for name, value in numbers.items()}


def advantages(rows: Sequence[Row], seeds: Sequence[int] = SEEDS) -> dict[tuple[str, int], float]:
    """Return the advantage of a pool over its rotated copies by task and number of rows, once both have all seeds."""
    arms: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        if row["arm"] in (FUSION, ROTATED):
            arms.setdefault((row["task"], row["rows"]), {FUSION: [], ROTATED: []})[row["arm"]].append(row)
    found = {}
    for key, by_arm in arms.items():
        if all({row["seed"] for row in own} == {*seeds} for own in by_arm.values()):
            fused, rotated = (np.mean([row["test_loss"] for row in by_arm[arm]]) for arm in (FUSION, ROTATED))
            found[key] = float(rotated - fused)
    return found


def cases_of(descents: Sequence[Row], gains: Mapping[tuple[str, int], float]) -> list[Case]:
    """Return the tasks with known advantages, and means of the seeds' features."""
    found: list[Case] = []
    for (task, number), gain in gains.items():
        own = [row for row in descents if (row["task"], row["rows"]) == (task, number)]
        if own:
            log_ratio, loss = (float(np.mean([row[name] for row in own])) for name in ("log_ratio", "loss"))
            found.append(Case(task=task, log_ratio=log_ratio, loss=loss, rows=number, advantage=gain))
    return found


def halves(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Return the cases of a random half of the tasks, and those of the other half."""
    tasks = sorted({case["task"] for case in cases})
    own = {tasks[i] for i in np.random.default_rng(SEED).permutation(len(tasks))[: len(tasks) // 2]}
    return [case for case in cases if case["task"] in own], [case for case in cases if case["task"] not in own]


def evaluated(cases: Sequence[Case]) -> list[list[str]]:
    """Return a table of the models on both halves, on that of the fit also without each task's own cases.

    Errors are root mean squares in nats.
    """
    fit, test = halves(cases)
    left_out = [[other for other in fit if other["task"] != case["task"]] for case in fit]
    parts = {"fit": (fit, [fit] * len(fit)), "fit, left out": (fit, left_out), "test": (test, [fit] * len(test))}
    table = [["model", "half", "tasks", *JUDGED]]
    for name, features in MODELS.items():
        for half, (own, fitted_on) in parts.items():
            found, means = [], []
            for case, known in zip(own, fitted_on, strict=True):
                found.append(fit_advantage(known, features).predict(case["log_ratio"], case["loss"], case["rows"]))
                means.append(float(np.mean([other["advantage"] for other in known])))
            table.append([name, half, str(len({case["task"] for case in own})), *judged(own, found, means)])
    return table


def of_language(cases: Sequence[Case], language: Sequence[Case]) -> list[list[str]]:
    """Return a table of the fit's forecasts on language, as they are and after a calibration on the other tasks."""
    fitted = halves(cases)[0]
    model, mean = fit_advantage(fitted), float(np.mean([case["advantage"] for case in fitted]))
    table = [["forecast", "tasks", *JUDGED]]
    plain, calibrated, means = [], [], []
    for case in language:
        others = [other for other in language if other is not case]
        means.append(float(np.mean([other["advantage"] for other in others])))
        for found, of in ((plain, model), (calibrated, model.calibrated(others))):
            found.append(of.predict(case["log_ratio"], case["loss"], case["rows"]))
    as_it_is, later = judged(language, plain, [mean] * len(language)), judged(language, calibrated, means)
    table.append(["fit on string tasks", str(len(language)), *as_it_is])
    table.append(["calibrated on the other tasks", str(len(language)), "-", "-", *later[2:]])
    return table


def judged(cases: Sequence[Case], found: Sequence[Prediction], means: Sequence[float]) -> list[str]:
    """Return rank correlation, share of the intervals that hold, and errors of forecasts and of means."""
    gains = np.array([case["advantage"] for case in cases])
    predicted, low, high = np.array(found).T
    rank = rank_correlation([case["task"] for case in cases], predicted, gains)
    errors = (np.sqrt(np.mean(np.square(guess - gains))) for guess in (predicted, np.array(means)))
    inside = np.mean((low <= gains) & (gains <= high))
    shown = (f"{rank[0]:.3f}", f"{rank[1]:.2f} to {rank[2]:.2f}", f"{inside:.0%}")
    return [*shown, *(f"{error:.3f}" for error in errors)]


def explained(cases: Sequence[Case], relevance: Mapping[str, str], language: Sequence[Case]) -> list[list[str]]:
    """Return a table of single features; relevance is the number of a string task's operations that its pool knows."""
    known = {name: len(CLASSES) - 1 - n for n, name in enumerate(CLASSES)}
    table = [["feature", "tasks", "rank correlation", "its 95 % interval"]]
    for kind, own in (("string", cases), ("language", language)):
        features = {
            "loss of the base": [case["loss"] for case in own],
            "logarithm of the gradient ratio": [case["log_ratio"] for case in own],
        }
        if kind == "string":
            features["operations of the task in the pool"] = [known[relevance[case["task"]]] for case in own]
        names, gains = [case["task"] for case in own], np.array([case["advantage"] for case in own])
        for feature, values in features.items():
            rank, low, high = rank_correlation(names, np.array(values), gains)
            table.append([feature, f"{len(own)} {kind}", f"{rank:.3f}", f"{low:.2f} to {high:.2f}"])
    return table


def rank_correlation(
    tasks: Sequence[str], predicted: np.ndarray, gains: np.ndarray, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Return Spearman's rank correlation with its 95 % interval, by a bootstrap over tasks."""
    names, of_task = np.unique(tasks, return_inverse=True)
    drawn = np.random.default_rng(SEED).integers(len(names), size=(resamples, len(names)))
    times = (drawn[:, :, None] == np.arange(len(names))).sum(axis=1)[:, of_task]  # that a case is in a resample

    def correlations(times: np.ndarray) -> np.ndarray:
        ranks = []
        for values in (predicted, gains):
            below, level = values[:, None] < values, values[:, None] == values
            rank = times @ (below + level / 2)  # less a half
            ranks.append(rank - np.average(rank, axis=1, weights=times)[:, None])
        x, y = ranks
        covariances = (np.sum(times * a * b, axis=1) for a, b in ((x, y), (x, x), (y, y)))
        with np.errstate(invalid="ignore"):
            return next(covariances) / np.sqrt(next(covariances) * next(covariances))

    low, high = np.nanquantile(correlations(times), (0.025, 0.975))
    rank = np.corrcoef(*(scipy.stats.rankdata(values) for values in (predicted, gains)))[0, 1]
    return float(rank), float(low), float(high)


def plot_cases(cases: Sequence[Case], path: Path) -> None:
    """Draw predicted and measured advantages of both halves."""
    parts = halves(cases)
    model = fit_advantage(parts[0])

    def on(figure: Any) -> None:
        axes = figure.subplots()
        for half, own, shade in zip(("fit", "test"), parts, (colour(3), colour(5)), strict=True):
            found = np.array([model.predict(case["log_ratio"], case["loss"], case["rows"]) for case in own])
            predicted, low, high = found.T
            how = {"fmt": "o", "color": shade, "elinewidth": 0.6, "label": f"{half} half"}
            axes.errorbar(
                predicted, [case["advantage"] for case in own], xerr=(predicted - low, high - predicted), **how
            )
        ends = axes.get_ylim()
        axes.plot(ends, ends, linestyle=":", color="black")
        axes.set_xlabel("predicted advantage with its 80 % interval, nats per answer token")
        axes.set_ylabel("measured advantage")
        axes.legend()

    plot(path, (6.0, 4.6), on)


if __name__ == "__main__":
    _script.run(main)
