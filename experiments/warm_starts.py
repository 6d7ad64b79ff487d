"""Does a pool make a better LoRA? LoRAs that start from a fusion, and from other models, for string tasks.

    python experiments/warm_starts.py                          # tables, tests and the figure of the rows in OUT
    python experiments/warm_starts.py --rows 20 95 5 --out OUT  # measures again: rates and all arms

The design is experiments/warm_starts.md. Tasks, pools, and the rows of LoRAFusion and of LoRA from scratch are those of
pool_value.py. Written to OUT: a line of tune.jsonl for each task and rate, a line of rows.jsonl for each cell, tables
as CSV, and loss.png. Interrupted, the same command continues.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import _script
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import tyro
from lab.common import ROOT, with_interval, write_tables
from lab.pool_rows import (
    ARMS,
    FUSION,
    ROTATED,
    TARGETS,
    ZERO,
    Arm,
    Entries,
    Lab,
    Row,
    run,
)
from lab.string_pools import CLASSES
from lab.tuning import best_tried, tried_line

import lorafusion_jax as lf
from lorafusion_jax.report import colour, holm, plot
from lorafusion_jax.tasks import TrainingRows
from lorafusion_jax.training import seed_entropies, start
from lorafusion_jax.trials import read_lines

SEEDS = (1, 2, 3)
ROWS = (5, 20, 95)
LORA = "LoRA, rank 16"
WARM = "from the fusion"
WARM_ROTATED = "from a rotated fusion"
SINGLE = "from the best single module"
MEAN = "from the mean module"
MAGNITUDES = "from magnitudes"
SINGLE_MODULES = "coefficients of single modules"
# What each arm starts from, and the share of the steps that train it.
STARTED = {
    WARM: (FUSION, 0.5),
    WARM_ROTATED: (ROTATED, 0.5),
    SINGLE: (SINGLE_MODULES, 0.0),
    MEAN: (SINGLE_MODULES, 0.0),
    MAGNITUDES: ("magnitudes only", 0.5),
}
COMPARED = (FUSION, LORA)  # measured by pool_value.py
SECONDARY = 5
POOL_VALUE = ROOT / "results" / "pool_value"
TESTED = {
    name: target.relevance
    for name, target in TARGETS.items()
    if target.pool != "tuning"
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      rows: numbers of training rows to measure, one after the other; none for the tables alone.
      arms: arms to measure, in this order.
      out: folder of results; cells that are there are not measured again.
      pools: folder of the pools that pool_value.py trains.
    """

    rows: tuple[Literal[5, 20, 95], ...] = ()
    arms: tuple[str, ...] = tuple(STARTED)
    out: Path = ROOT / "results" / "warm_starts"
    pools: Path = ROOT / "runs" / "pool_value" / "pools"


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and write tables and figure."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    lab = StartedLab(options.pools) if options.rows else None
    for rows, name in itertools.product(options.rows, options.arms):
        assert lab is not None
        keys = [
            (name, rows, task, seed, 0)
            for task, seed in itertools.product(TESTED, SEEDS)
        ]
        run(lab, keys, options.out / "rows.jsonl", begin(name, rows))
    rows = with_earlier_rows(read_lines(options.out / "rows.jsonl"))
    write_tables(options.out, tables(rows, read_lines(options.out / "tune.jsonl")))
    draw(rows, options.out / "loss.png")


class StartedLab(Lab):
    """The lab of the pool's value, with LoRAs that start from another arm."""

    arms = {
        **ARMS,
        **dict.fromkeys(STARTED, ARMS[LORA]),
        SINGLE_MODULES: Arm("coefficients", "real", recipe={"granularity": "global"}),
    }
    lanes = len(SEEDS)

    def trained(
        self,
        name: str,
        of_pool: tuple[str, int],
        problem: lf.Problem,
        rows: TrainingRows,
        entries: Entries,
    ) -> tuple[Any, int]:
        """Return the parameters of an arm for each entry, and the number of steps in all."""
        source, share = STARTED[name]
        other = self.of_entries(source, *of_pool, entries)
        seeds = tuple(seed for seed, _ in entries)
        steps = 0
        params = (
            best_single(other, rows) if name == SINGLE else start(other, seeds).params
        )  # those of the mean
        if share:
            params, steps = self.fitted(source, other, rows, entries, share=share)
        assert isinstance(problem.method, lf.LoRA)
        begin, _ = problem.method.start_at(other, params, start(problem, seeds).params)
        found, more = self.fitted(
            name, problem, rows, entries, share=1 - share, begin=begin
        )
        return found, steps + more


def best_single(problem: lf.Problem, rows: TrainingRows) -> Any:
    """Return coefficients of 1 for the module of least loss on the training rows of each seed."""
    seeds, modules = problem.index.shape
    (batch,) = rows.once(rows.split.train.shape[1])
    losses = []
    for n in range(modules):
        params = {"coefficients": jnp.tile(jax.nn.one_hot(n, modules), (seeds, 1))}
        losses.append(np.asarray(seed_entropies(params, batch, problem)))
    return {"coefficients": jax.nn.one_hot(np.argmin(losses, axis=0), modules)}


def begin(name: str, rows: int) -> dict[str, float]:
    """Return the rates that pool_value.py found for the two parts of an arm, from which its tuning starts."""
    earlier = read_lines(POOL_VALUE / "tune.jsonl")
    parts = [best_tried(earlier, part, rows) for part in (STARTED[name][0], LORA)]
    return {
        rate: value
        for part in parts
        if part is not None
        for rate, value in part.rates.items()
    }


def with_earlier_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with those of the same tasks, numbers and seeds that pool_value.py measured."""
    earlier = [
        row
        for number in ROWS
        for row in read_lines(POOL_VALUE / f"rows_{number}.jsonl")
    ]
    return [
        *rows,
        *(
            row
            for row in earlier
            if row["arm"] in (*COMPARED, ZERO) and row["seed"] in SEEDS
        ),
    ]


def means(
    rows: Sequence[Row], arm: str, number: int, value: str = "test_loss"
) -> dict[str, float] | None:
    """Return the mean of an arm by task over the seeds, once all of its cells exist."""
    found = {
        (row["task"], row["seed"]): row[value]
        for row in rows
        if (row["arm"], row["rows"]) == (arm, number)
    }
    if not found.keys() >= {*itertools.product(TESTED, SEEDS)}:
        return None
    return {
        task: float(np.mean([found[task, seed] for seed in SEEDS])) for task in TESTED
    }


def difference(
    rows: Sequence[Row], arm: str, number: int, value: str = "test_loss"
) -> dict[str, float] | None:
    """Return the loss of an arm minus that of the LoRA from the fusion, by task."""
    a = means(rows, arm, number, value)
    b = means(rows, WARM, number, value)
    return (
        None if a is None or b is None else {task: a[task] - b[task] for task in TESTED}
    )


def tables(rows: Sequence[Row], tuning: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Return the tables of arms and contrasts whose cells all exist, and of the tests of the design."""
    arms = [["arm", "rows", "test loss", "exact match, %"]]
    contrasts = [
        [
            "rows",
            "arm minus LoRA from the fusion",
            "relevance",
            "tasks",
            "nats",
            "95 % interval",
            "points",
        ]
    ]
    rates = [["arm", "rows", "rates", "mean test loss", "rates tried"]]
    for number, name in itertools.product(ROWS, (ZERO, *COMPARED, *STARTED)):
        loss = means(rows, name, number)
        match = means(rows, name, number, "exact_match")
        if loss is None or match is None:
            continue
        arms.append(
            [
                name,
                str(number),
                *(
                    f"{np.mean([*of.values()]):.{d}f}"
                    for of, d in ((loss, 3), (match, 1))
                ),
            ]
        )
        gain = difference(rows, name, number)
        points = difference(rows, name, number, "exact_match")
        if name != WARM and gain is not None and points is not None:
            for relevance in ("all", *CLASSES):
                own = [task for task in TESTED if relevance in ("all", TESTED[task])]
                nats = with_interval([gain[task] for task in own], 3)
                more = np.mean([points[task] for task in own])
                contrasts.append(
                    [str(number), name, relevance, str(len(own)), *nats, f"{more:.1f}"]
                )
        if name in STARTED:
            rates += tried_line(tuning, name, number)
    found = {"arms": arms, "contrasts": contrasts, "rates": rates, "tests": tests(rows)}
    return {name: lines for name, lines in found.items() if len(lines) > 1}


def tests(rows: Sequence[Row]) -> list[list[str]]:
    """Return the tests of the design; a secondary one whose cells are missing counts with p = 1."""
    lines: list[list[str]] = []
    contrasts = (
        (LORA, 20),
        (FUSION, 20),
        (WARM_ROTATED, 20),
        (FUSION, 95),
        (WARM_ROTATED, 95),
    )
    p_values: list[float] = []
    for arm, number in contrasts:
        gain = difference(rows, arm, number)
        if gain is not None:
            found: Any = scipy.stats.ttest_1samp([*gain.values()], 0.0)
            p_values.append(float(found.pvalue))
            lines.append(
                [
                    f"{arm} minus {WARM}, {number} rows",
                    *with_interval([*gain.values()], 3),
                ]
            )
        else:
            p_values.append(1.0)
            lines.append([])
    gain = difference(rows, LORA, 20)
    p_values.append(1.0)
    lines.append([])
    if gain is not None:
        place = [
            len(CLASSES) - 1 - CLASSES.index(TESTED[task]) for task in gain
        ]  # operations in the pool
        trend: Any = scipy.stats.linregress(place, [*gain.values()])
        half = scipy.stats.t.ppf(0.975, len(gain) - 2) * trend.stderr
        p_values[-1] = float(trend.pvalue)
        interval = f"{trend.slope - half:.3f} to {trend.slope + half:.3f}"
        lines[-1] = [
            "the first one, more per class of relevance",
            f"{trend.slope:.3f}",
            interval,
        ]
    corrected = ["-", *(f"{p:.2g}" for p in holm(p_values[1:]))]
    shown = zip(lines, p_values, corrected, strict=True)
    head = ["contrast", "nats", "95 % interval", "p", "p by Holm"]
    return [head, *([*line, f"{p:.2g}", by_holm] for line, p, by_holm in shown if line)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the test loss against the number of training rows, a line for each arm, from the base and routers on."""
    shown: dict[str, Mapping[int, float]] = {}
    for name in (*COMPARED, *STARTED):
        by_number = {number: means(rows, name, number) for number in ROWS}
        shown[name] = {
            number: np.mean([*of.values()]).item()
            for number, of in by_number.items()
            if of is not None
        }
    base = means(rows, ZERO, ROWS[0])
    if base is None or not all(shown.values()):
        return

    def on(figure: Any) -> None:
        panel = figure.subplots()
        for n, (name, losses) in enumerate(shown.items()):
            numbers = {0: float(np.mean([*base.values()])), **losses}
            panel.plot(
                [*map(str, numbers)],
                [*numbers.values()],
                "o-",
                color=colour(n),
                label=_LABELS.get(name, name),
            )
        routed = [
            row
            for row in read_lines(ROUTING)
            if row["what"] == "use" and row["task"] in TESTED
        ]
        for n, (name, marker) in enumerate(_MARKERS.items()):
            loss = np.mean([row["loss"] for row in routed if row["router"] == name])
            panel.plot(
                ["0"],
                [loss],
                marker,
                color=colour(n),
                label=f"{name}, no training",
                linestyle="",
            )
        panel.set_xlabel("training rows")
        panel.set_ylabel("test loss, nats per token")
        panel.legend(fontsize="small")

    plot(path, (7.0, 4.8), on)


ROUTING = ROOT / "results" / "routing" / "rows.jsonl"
_MARKERS = {"uniform": "s", "nearest": "^", "nearest, top 3": "v", "divergence": "D"}
_LABELS = {LORA: "LoRA from scratch", **{name: f"LoRA {name}" for name in STARTED}}


if __name__ == "__main__":
    _script.run(main)
