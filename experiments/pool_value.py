"""When does a pool of LoRA modules help? Fusions of real and of rotated pools for string tasks drawn at random.

    python experiments/pool_value.py                              # tables, tests and the figure of the rows in OUT
    python experiments/pool_value.py --rows 20 5 95 10 --out OUT  # measures again: pools, rates and all arms

The design is experiments/pool_value.md. Written to OUT: draw.csv, a line of tune.jsonl for each task and rate, a line
of rows_N.jsonl for each cell of N training rows, tables as CSV, and advantage.png. Adapters are trained into POOLS.
Interrupted, the same command continues.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _script
import numpy as np
import scipy.stats
import tyro
from lab.common import ROOT, with_interval, write_csv, write_tables
from lab.pool_rows import (
    ARMS,
    BARE,
    BARE_ROTATED,
    EPOCHS,
    FUSION,
    ROTATED,
    SHUFFLED,
    SMALL_LORA,
    TARGETS,
    TRAINED,
    ZERO,
    Lab,
    Row,
    cells,
    key_of,
    run,
)
from lab.string_pools import CLASSES, design, write_pools
from lab.tuning import best_tried

from lorafusion_jax.report import colour, holm, over_tasks, plot
from lorafusion_jax.trials import read_lines

EQUIVALENT = 0.05  # nats: the bound of "no advantage"
ROWS_OF_TESTS = 20
SECONDARY = ("H2", "H3", "H4", "H5", "H6")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      rows: numbers of training rows to measure, one after the other; none for the tables alone.
      out: folder of results; cells that are there are not measured again.
      pools: folder of the trained pools, one of PEFT adapters for each; missing ones are trained.
    """

    rows: tuple[Literal[5, 10, 20, 95], ...] = ()
    out: Path = ROOT / "results" / "pool_value"
    pools: Path = ROOT / "runs" / "pool_value" / "pools"


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and write tables and figure."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    write_csv(options.out / "draw.csv", draw_table())
    lab = Lab(options.pools)
    for rows in options.rows:
        for name in ARMS:
            if (kind := ARMS[name].pool) != "none":
                for folder in write_pools(
                    options.pools, shuffled=kind == "shuffled-labels"
                ):
                    print(f"trained {folder}", file=sys.stderr, flush=True)
            file = options.out / f"rows_{rows}.jsonl"
            run(lab, cells(name, rows), file, ARMS[name].rates, together=True)
    everything = [
        row for rows in EPOCHS for row in read_lines(options.out / f"rows_{rows}.jsonl")
    ]
    write_tables(
        options.out, tables(everything, read_lines(options.out / "tune.jsonl"))
    )
    draw(everything, options.out / "advantage.png")


class Test(NamedTuple):
    """A hypothesis of the design: its estimate in nats with the 95 % interval, and p before correction."""

    name: str
    statement: str
    tasks: int
    estimate: float
    low: float
    high: float
    p: float


def draw_table() -> list[list[str]]:
    """Return the drawn pools and targets."""
    lines = [["pool", "use", "task"]]
    for name, tasks in design().pools.items():
        lines += [[name, "adapter", task.name] for task in tasks]
        lines += [
            [name, target.relevance, target.task.name]
            for target in design().targets
            if target.pool == name
        ]
    return lines


def means(
    rows: Sequence[Row], arm: str, number: int, value: str = "test_loss"
) -> dict[str, float] | None:
    """Return the mean of an arm by task, over seeds and draws, once all of its cells exist."""
    own = {
        key_of(row): row
        for row in rows
        if (row["arm"], row["rows"]) == (arm, number) and value in row
    }
    if not own.keys() >= {*cells(arm, number)}:
        return None
    by_task: dict[str, list[float]] = {}
    for row in own.values():
        by_task.setdefault(row["task"], []).append(row[value])
    return {task: float(np.mean(values)) for task, values in by_task.items()}


def difference(
    rows: Sequence[Row], first: str, second: str, number: int
) -> dict[str, float] | None:
    """Return the test loss of the first arm minus that of the second, by task of the draw."""
    a = means(rows, first, number)
    b = means(rows, second, number)
    return (
        None
        if a is None or b is None
        else {task: a[task] - b[task] for task in RELEVANCE}
    )


RELEVANCE = {
    name: target.relevance
    for name, target in TARGETS.items()
    if target.pool != "tuning"
}


def tests(rows: Sequence[Row]) -> list[Test]:
    """Return the tests whose cells all exist; an advantage is a loss minus that of LoRAFusion."""
    found: list[Test] = []

    def add(
        name: str, statement: str, values: Sequence[float], p: float | None = None
    ) -> None:
        interval = over_tasks(values)
        assert interval is not None
        found.append(
            Test(
                name,
                statement,
                len(values),
                *interval,
                _t(values, 0.0, "two-sided") if p is None else p,
            )
        )

    main = difference(rows, ROTATED, FUSION, ROWS_OF_TESTS)
    if main is not None:
        add("H1", "rotated minus LoRAFusion, 20 rows", [*main.values()])
        place = [len(CLASSES) - 1 - CLASSES.index(RELEVANCE[task]) for task in main]
        trend: Any = scipy.stats.linregress(place, [*main.values()])
        half = scipy.stats.t.ppf(0.975, len(main) - 2) * trend.stderr
        slope = float(trend.slope)
        ends = (slope - half, slope + half)
        found.append(
            Test(
                "H2",
                "that, more per class of relevance",
                len(main),
                slope,
                *ends,
                float(trend.pvalue),
            )
        )
    few = difference(rows, ROTATED, FUSION, 5)
    many = difference(rows, ROTATED, FUSION, 95)
    if few is not None and many is not None:
        add(
            "H3",
            "that, 5 rows minus 95 rows",
            [few[task] - many[task] for task in RELEVANCE],
        )
    if main is not None:
        foreign = [
            value for task, value in main.items() if RELEVANCE[task] == "foreign"
        ]
        add(
            "H4",
            f"that, foreign tasks; p of equivalence within {EQUIVALENT}",
            foreign,
            equivalence(foreign),
        )
    if (lora := difference(rows, SMALL_LORA, FUSION, ROWS_OF_TESTS)) is not None:
        add("H5", "LoRA of rank 1 minus LoRAFusion, 20 rows", [*lora.values()])
    if (labels := difference(rows, ROTATED, SHUFFLED, ROWS_OF_TESTS)) is not None:
        add("H6", "rotated minus shuffled labels, 20 rows", [*labels.values()])
    return found


def equivalence(values: Sequence[float], bound: float = EQUIVALENT) -> float:
    """Return p of two one-sided t tests that the mean is between -bound and bound."""
    sides = ((-bound, "greater"), (bound, "less"))
    return max(_t(values, end, side) for end, side in sides)


def _t(values: Sequence[float], mean: float, alternative: Any) -> float:
    found: Any = scipy.stats.ttest_1samp(values, mean, alternative=alternative)
    return float(found.pvalue)


def tables(rows: Sequence[Row], tuning: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Return the tables of all arms and contrasts whose cells exist."""
    found: dict[str, list[list[str]]] = {}
    lines = [["arm", "parameters", "rows", "test loss", "exact match, %"]]
    for name, number in itertools.product(ARMS, EPOCHS):
        loss = means(rows, name, number)
        match = means(rows, name, number, "exact_match")
        if match is not None:
            counts = next(row["numbers"] for row in rows if row["arm"] == name)
            shown = "-" if loss is None else f"{np.mean([*loss.values()]):.3f}"
            lines.append(
                [
                    name,
                    f"{counts:,}",
                    str(number),
                    shown,
                    f"{np.mean([*match.values()]):.1f}",
                ]
            )
    found["arms"] = lines
    lines = [
        [
            "task",
            "pool",
            "relevance",
            "rows",
            "base",
            "base, training rows",
            "rotated",
            "LoRAFusion",
            "advantage",
        ]
    ]
    curve = [
        ["rows", "arm minus LoRAFusion", "relevance", "tasks", "nats", "95 % interval"]
    ]
    for number in EPOCHS:
        arms = [means(rows, name, number) for name in (ZERO, ROTATED, FUSION)]
        on_rows = means(rows, ZERO, number, "training_rows_loss")
        gain = difference(rows, ROTATED, FUSION, number)
        if gain is None or on_rows is None:
            continue
        for target in design().targets:
            if (task := target.task.name) in gain:
                base, *trained = [
                    by_task[task] for by_task in arms if by_task is not None
                ]
                numbers = (base, on_rows[task], *trained, gain[task])
                of_target = [task, target.pool, target.relevance, str(number)]
                lines.append([*of_target, *(f"{value:.4f}" for value in numbers)])
    for number, arm in itertools.product(
        EPOCHS, (name for name in TRAINED if name != FUSION)
    ):
        if (gain := difference(rows, arm, FUSION, number)) is not None:
            curve += [[str(number), arm, *line] for line in by_class(gain)]
    alone = [
        [
            "rows",
            "relevance",
            "tasks",
            "rotated minus real, coefficients only",
            "95 % interval",
        ]
    ]
    for number in EPOCHS:
        if (gain := difference(rows, BARE_ROTATED, BARE, number)) is not None:
            alone += [[str(number), *line] for line in by_class(gain)]
    found |= {"advantage": lines, "contrasts": curve, "alone": alone}
    everything = tests(rows)
    p_of = {test.name: test.p for test in everything}
    corrected = dict(
        zip(SECONDARY, holm([p_of.get(name, 1.0) for name in SECONDARY]), strict=True)
    )
    found["tests"] = [
        ["", "contrast, nats", "tasks", "estimate", "95 % interval", "p", "p by Holm"]
    ]
    for test in everything:
        p = (
            f"{test.p:.2g}",
            f"{corrected[test.name]:.2g}" if test.name in corrected else "-",
        )
        interval = f"{test.estimate:.3f}", f"{test.low:.3f} to {test.high:.3f}"
        found["tests"].append(
            [test.name, test.statement, str(test.tasks), *interval, *p]
        )
    found["rates"] = [["arm", "rows", *_RATES, "mean test loss", "rates tried"]]
    for name, number in itertools.product(TRAINED, EPOCHS):
        best = best_tried(tuning, name, number)
        if best and {*cells(name, number)} <= {key_of(row) for row in rows}:
            rates = [
                f"{best.rates[rate]:g}" if rate in best.rates else "-"
                for rate in _RATES
            ]
            found["rates"].append(
                [name, str(number), *rates, f"{best.loss:.3f}", str(best.number)]
            )
    return {name: lines for name, lines in found.items() if len(lines) > 1}


_RATES = ("lr_coefficients", "lr_magnitudes", "lr_lora")


def by_class(gain: Mapping[str, float]) -> Iterator[list[str]]:
    """Yield class, number of tasks, mean and interval of differences by task, for all tasks and for each class."""
    for relevance in ("all", *CLASSES):
        own = [
            value
            for task, value in gain.items()
            if relevance in ("all", RELEVANCE[task])
        ]
        yield [relevance, str(len(own)), *with_interval(own, 3)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the advantage of the pool against the number of training rows, a line for each class."""
    by_number = {number: difference(rows, ROTATED, FUSION, number) for number in EPOCHS}
    there = {number: gain for number, gain in by_number.items() if gain is not None}
    if not there:
        return

    def on(figure: Any) -> None:
        panel = figure.subplots()
        for n, relevance in enumerate(CLASSES):
            own = [
                [gain[task] for task in gain if RELEVANCE[task] == relevance]
                for gain in there.values()
            ]
            ends = np.array([over_tasks(values) for values in own])
            at = np.array([*there]) * 1.03 ** (n - 1)
            about = np.abs(ends[:, 1:].T - ends[:, 0])
            panel.errorbar(
                at,
                ends[:, 0],
                about,
                fmt="o-",
                capsize=3,
                color=colour(n + 1),
                label=_LABELS[relevance],
            )
        panel.axhline(0.0, linestyle=":", color="black")
        panel.set_xscale("log")
        panel.set_xlim(min(there) / 1.3, max(there) * 1.3)
        panel.minorticks_off()
        panel.set_xticks([*there], [str(number) for number in there])
        panel.set_xlabel("training rows")
        panel.set_ylabel("advantage over a rotated pool, nats per token")
        panel.legend()

    plot(path, (7.0, 4.2), on)


_LABELS = {
    "both": "both operations in the pool",
    "one": "one of them",
    "foreign": "neither",
}


if __name__ == "__main__":
    _script.run(main)
