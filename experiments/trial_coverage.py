"""Does `lorafusion trial` choose well, and are its intervals right? Its procedure on made-up tasks with known truth.

    python experiments/trial_coverage.py

A task is softmax regression: a base, modules, a useless rotation of them, and rows. The methods are trained by Adam as
those of the package. The truth is the loss on fresh rows of methods that are trained on all rows with the rates of the
trial. `trial_coverage.md` is the design. Results are rows of OUT; interrupted, the same command continues.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _script
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int
from lab.common import ROOT, write_tables

from lorafusion_jax.report import over_tasks
from lorafusion_jax.trials import (
    Outcomes,
    ResultRows,
    Row,
    Scores,
    Training,
    TrialArm,
    best_arm,
    judge,
    procedure,
    read_lines,
)

TASKS = range(10_600, 10_800)
SIZES = (20, 40, 80)
MOST_ROWS = 160
CLASSES = 8
FEATURES = 24
TOKENS = 3
MODULES = 6
FRESH = 3_000  # rows for the truth
STEPS = 40
SHOTS = 5
LANES = 8  # trainings of one program
ROTATIONS = 3

_FUSED = {"magnitudes": 0.03, "coefficients": 0.05}
_FUSED_NUMBERS = FEATURES + MODULES
ARMS = (
    TrialArm(name="base", role="base", learns=False),
    TrialArm(name="examples", role="examples"),
    TrialArm(name="single", role="single"),
    TrialArm(
        name="magnitudes",
        role="magnitudes",
        rates={"magnitudes": 0.03},
        parameters=FEATURES,
    ),
    TrialArm(name="pool", role="pool", rates=_FUSED, parameters=_FUSED_NUMBERS),
    TrialArm(
        name="rotated", role="control", draw=1, rates=_FUSED, parameters=_FUSED_NUMBERS
    ),
    TrialArm(
        name="LoRA", role="lora", rates={"lora": 0.02}, parameters=CLASSES * FEATURES
    ),
)
_SHAPE = (CLASSES, FEATURES)


class Task(NamedTuple):
    """A made-up task. Rows behind the first ones are fresh.

    Attributes:
      base: weights that all methods start from.
      best: weights that draw the answers.
      modules: modules of the pool, then of each rotation.
      inputs: features of each token.
      mask: tokens of each answer.
      answers: class of each token.
      groups: number of each row's input.
    """

    base: Float[np.ndarray, "classes features"]
    best: Float[np.ndarray, "classes features"]
    modules: Float[np.ndarray, "draws modules classes features"]
    inputs: Float[np.ndarray, "rows tokens features"]
    mask: Bool[np.ndarray, "rows tokens"]
    answers: Int[np.ndarray, "rows tokens"]
    groups: Int[np.ndarray, " rows"]


def _unit(weights: np.ndarray) -> np.ndarray:
    """Return weights whose logits have a variance of one."""
    return weights / np.linalg.norm(weights) * np.sqrt(CLASSES)


def draw(number: int) -> Task:
    """Return a task; what the pool, magnitudes and other weights contribute is drawn too."""
    rng = np.random.default_rng([54, number])
    scale = rng.uniform(1, 4)
    change = rng.choice([0.0, 1.0], p=[0.1, 0.9]) * rng.uniform(0.5, 4)
    bias = rng.choice([0.0, 1.0]) * rng.uniform(1, 5)
    parts = rng.dirichlet([0.5, 0.3, 0.5])
    repeats = rng.choice([0.0, 0.3])

    base = scale * _unit(rng.normal(size=_SHAPE))
    modules = np.stack(
        [
            _unit(rng.normal(size=(CLASSES, 2)) @ rng.normal(size=(2, FEATURES)))
            for _ in range(MODULES)
        ]
    )
    weights = rng.normal(size=MODULES) * rng.choice([1.0, 0.2], size=MODULES)
    directions = (
        np.tensordot(weights, modules, 1),
        base * rng.normal(size=FEATURES),
        rng.normal(size=_SHAPE),
    )
    steps = [
        np.sqrt(part) * _unit(direction)
        for part, direction in zip(parts, directions, strict=True)
    ]
    best = base + change * sum(steps)
    # A wrong format of answers, which every training corrects soon.
    base[:, 0] = bias * rng.normal(size=CLASSES)
    best[:, 0] = base[:, 0] * rng.uniform(0, 1)
    rotated = [
        modules @ np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0]
        for _ in range(ROTATIONS)
    ]

    source = np.arange(MOST_ROWS + FRESH)  # row that has the same input
    for row in 1 + np.flatnonzero(rng.random(MOST_ROWS - 1) < repeats):
        source[row] = source[rng.integers(row)]
    row_parts = rng.normal(size=(len(source), 1, FEATURES))
    token_parts = rng.normal(size=(len(source), TOKENS, FEATURES))
    inputs = ((row_parts + token_parts) / np.sqrt(2))[source]
    inputs[:, :, 0] = 1
    lengths = rng.integers(1, TOKENS + 1, size=(len(source), 1))
    mask = (np.arange(TOKENS) < lengths)[source]
    logits = inputs @ best.T
    answers = np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1)
    every_module = np.stack([modules, *rotated])
    return Task(base, best, every_module, inputs, mask, answers, source[:MOST_ROWS])


class Lane(NamedTuple):
    """A training: its rows, modules and rates; rows that are examples; 1 if it chooses one module."""

    train: Any
    draw: Any
    rates: Any
    share: Any
    examples: Any
    single: Any


def _lane(training: Training, rows: int) -> Lane:
    train = np.zeros(rows, np.float32)
    train[list(training.train)] = 1
    examples = np.zeros(rows, np.float32)
    if training.arm == "examples":
        examples[list(training.train[:SHOTS])] = 1
    none = dict.fromkeys(("coefficients", "magnitudes", "lora"), 0.0)
    return Lane(
        train=train,
        draw=training.draw,
        rates=jax.tree.map(np.float32, none | dict(training.rates)),
        share=np.float32(training.share),
        examples=examples,
        single=np.float32(training.arm == "single"),
    )


def logits_of(
    weights: Mapping[str, Any], base: Any, modules: Any, inputs: Any
) -> Array:
    """Return the logits of inputs."""
    matrix = base + jnp.tensordot(weights["coefficients"], modules, 1) + weights["lora"]
    return (inputs * (1 + weights["magnitudes"])) @ matrix.T


@jax.jit
def train(
    lanes: Lane,
    base: Array,
    every_module: Array,
    inputs: Array,
    mask: Array,
    answers: Array,
) -> Any:
    """Return the trained weights of each lane, and the loss and match of each row."""

    def train_lane(lane: Lane) -> Any:
        modules = every_module[lane.draw]

        def losses(weights: Mapping[str, Array]) -> Array:
            logp = jax.nn.log_softmax(logits_of(weights, base, modules, inputs))
            chosen = jnp.take_along_axis(logp, answers[..., None], axis=-1)
            return -jnp.sum(chosen[..., 0] * mask, axis=-1)

        def loss(weights: Mapping[str, Array], rows: Array) -> Array:
            tokens = jnp.sum(rows * mask.sum(axis=-1))
            return jnp.sum(losses(weights) * rows) / jnp.maximum(tokens, 1)

        def module_loss(coefficients: Array) -> Array:
            return loss(zero | {"coefficients": coefficients}, lane.train)

        zero = {
            "coefficients": jnp.zeros(MODULES),
            "magnitudes": jnp.zeros(FEATURES),
            "lora": jnp.zeros(_SHAPE),
        }
        nearest = jnp.argmin(jax.vmap(module_loss)(jnp.eye(MODULES)))
        # Examples in the prompt count as one step of gradient descent (von Oswald et al., 2023).
        begin = zero | {
            "coefficients": lane.single * jax.nn.one_hot(nearest, MODULES),
            "lora": -jax.grad(loss)(zero, lane.examples)["lora"],
        }
        steps = jnp.round(STEPS * lane.share)

        def step(carry: Any, number: Array) -> tuple[Any, None]:
            weights, first, second = carry
            grad = jax.grad(loss)(weights, lane.train)
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grad)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grad)
            decay = jnp.clip(1 - number / steps, 0)
            count = number + 1

            def moved(w: Array, m: Array, v: Array, rate: Array) -> Array:
                scale = jnp.sqrt(v / (1 - 0.999**count)) + 1e-8
                return w - rate * decay * m / (1 - 0.9**count) / scale

            weights = jax.tree.map(moved, weights, first, second, lane.rates)
            return (weights, first, second), None

        none = jax.tree.map(jnp.zeros_like, zero)
        carry, _ = jax.lax.scan(step, (begin, none, none), jnp.arange(STEPS))
        weights = carry[0]
        likeliest = jnp.argmax(logits_of(weights, base, modules, inputs), axis=-1)
        right = jnp.all((likeliest == answers) | ~mask, axis=-1)
        return weights, losses(weights), right

    return jax.vmap(train_lane)(lanes)


def trained(
    task: Task, rows: int, trainings: Sequence[Training]
) -> Iterator[tuple[Training, Any]]:
    """Yield each training with its weights, and the loss and match of each row."""
    arrays = [
        values.astype(np.float32)
        for values in (task.base, task.modules, task.inputs[:rows])
    ]
    for first in range(0, len(trainings), LANES):
        part = trainings[first : first + LANES]
        lanes = [_lane(training, rows) for training in part]
        lanes += lanes[-1:] * (LANES - len(lanes))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *lanes)
        results = jax.device_get(
            train(stacked, *arrays, task.mask[:rows], task.answers[:rows])
        )
        for place, training in enumerate(part):
            yield training, jax.tree.map(lambda leaf, place=place: leaf[place], results)


def truth(task: Task, rows: int, outcomes: Outcomes) -> dict[str, float]:
    """Return the expected loss on fresh rows of methods that are trained on all rows."""
    every = tuple(range(rows))
    trainings = [
        Training(
            arm.name,
            arm.draw,
            *outcomes.tuned.get(arm.name, ((), 1.0)),
            train=every if arm.learns else (),
            test=every,
        )
        for arm in ARMS
    ]
    inputs = task.inputs[-FRESH:]
    mask = task.mask[-FRESH:]
    chances = jax.nn.softmax(inputs @ task.best.T)
    losses = {}
    for training, (weights, _, _) in trained(task, rows, trainings):
        modules = task.modules[training.draw]
        logp = jax.nn.log_softmax(logits_of(weights, task.base, modules, inputs))
        loss = -jnp.sum(jnp.sum(chances * logp, axis=-1) * mask) / mask.sum()
        losses[training.arm] = round(float(loss), 4)
    return losses


def measured(number: int, rows: int) -> Row:
    """Return the row of a task with some of its rows."""
    task = draw(number)
    tokens = task.mask[:rows].sum(axis=-1).mean()
    cost = 0.0

    def measure(trainings: Sequence[Training]) -> Iterator[Scores]:
        nonlocal cost
        for training, (_, losses, right) in trained(task, rows, trainings):
            cost += len(training.rates) and training.share * len(training.train) / rows
            test = list(training.test)
            yield Scores(losses[test] / tokens, right[test].astype(float))

    groups = task.groups[:rows].tolist()
    looks = [
        (round(cost, 2), outcomes)
        for outcomes in procedure(ARMS, groups, measure, seed=number)
    ]
    outcomes = looks[-1][1]
    verdict = judge(outcomes)
    minus_pool = {}
    for arm in outcomes.arms:
        if arm.role != "pool":
            shared = outcomes.common_rows(arm.name, "pool")
            difference = outcomes.loss[arm.name] - outcomes.loss["pool"]
            minus_pool[arm.name] = outcomes.sample(shared).interval(difference[shared])
    return {
        "task": number,
        "rows": rows,
        "named": verdict.arm if verdict.is_named else None,
        "rounds": [[cost, best_arm(outcomes)] for cost, outcomes in looks],
        "minus_pool": jax.tree.map(lambda end: round(end, 4), minus_pool),
        "minus_best": jax.tree.map(lambda end: round(end, 4), verdict.behind),
        "truth": truth(task, rows, outcomes),
    }


def regret(row: Row, arm: str) -> float:
    """Return how much worse a method is than the best one, controls left out."""
    losses = [loss for name, loss in row["truth"].items() if name != "rotated"]
    return row["truth"][arm] - min(losses)


def _earlier_choice(row: Row) -> str:
    losses = {arm: interval[0] for arm, interval in row["contrasts"].items()}
    losses |= {"pool": 0.0}
    del losses["rotated"]
    return min(losses, key=losses.__getitem__)


def _covered(rows: Sequence[Row], intervals: str) -> str:
    hits = []
    for row in rows:
        other = "pool" if intervals == "minus_pool" else row["rounds"][-1][1]
        for arm, (_, low, high) in row[intervals].items():
            hits.append(low <= row["truth"][arm] - row["truth"][other] <= high)
    return f"{100 * np.mean(hits):.1f}"


def _mean(values: Sequence[float]) -> str:
    ends = over_tasks(values)
    assert ends is not None
    return f"{ends.mean:.3f} ({ends.low:.3f} to {ends.high:.3f})"


def _column(rows: Sequence[Row], earlier: Mapping[int, Row]) -> dict[str, str]:
    """Return the figures of rows of one size."""
    # The first round has no training. The search of rates is over before the last folds, of which there are five.
    answers = {
        "first answer with all methods": 1,
        "search of rates": -6,
        "last fold": -1,
    }
    figures = {}
    for name, place in answers.items():
        looks = [row["rounds"][place] for row in rows]
        regrets = [regret(row, look[1]) for row, look in zip(rows, looks, strict=True)]
        figures[f"regret after the {name}, nats"] = _mean(regrets)
        figures[f"trainings until then ({name})"] = (
            f"{np.mean([cost for cost, _ in looks]):.1f}"
        )
    pairs = [(row, earlier[row["task"]]) for row in rows]
    choices = [(row["rounds"][-1][1], _earlier_choice(other)) for row, other in pairs]
    differences = [
        regret(row, choice) - regret(other, earlier_choice)
        for (row, other), (choice, earlier_choice) in zip(pairs, choices, strict=True)
    ]
    truths = [
        row["truth"][choice] - other["truth"][earlier_choice]
        for (row, other), (choice, earlier_choice) in zip(pairs, choices, strict=True)
    ]
    named = [row for row in rows if row["named"]]
    wrong = [row for row in named if wrong_by(row) > 0.05]
    return figures | {
        "regret minus that of the earlier procedure, nats": _mean(differences),
        "loss minus that of the earlier procedure, nats": _mean(truths),
        "intervals against the pool that cover, %": _covered(rows, "minus_pool"),
        "intervals of the report that cover, %": _covered(rows, "minus_best"),
        "tasks with a named method, %": f"{100 * len(named) / len(rows):.1f}",
        "tasks with a wrong name, %": f"{100 * len(wrong) / len(rows):.1f}",
    }


def wrong_by(row: Row) -> float:
    """Return how much worse the named method is than the best of all, in nats."""
    return row["truth"][row["named"]] - min(row["truth"].values())


def table(rows: Sequence[Row], earlier: Sequence[Row]) -> list[list[str]]:
    """Return a line for each figure, and a column for each number of rows."""
    columns = [
        _column(
            [row for row in rows if row["rows"] == size],
            {row["task"]: row for row in earlier if row["rows"] == size},
        )
        for size in SIZES
    ]
    heading = ["", *(f"{size} rows" for size in SIZES)]
    return [
        heading,
        *([name, *(column[name] for column in columns)] for name in columns[0]),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options.

    Attributes:
      out: folder of the rows and the table.
    """

    out: Path = ROOT / "results" / "trial"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    results = ResultRows(
        options.out / "coverage_rounds.jsonl", lambda row: (row["task"], row["rows"])
    )
    results.fill(
        [(number, rows) for number in TASKS for rows in SIZES],
        lambda missing: (measured(*key) for key in missing),
        lambda row: f"{row['task']}, {row['rows']} rows: {row['rounds'][-1]}",
    )
    earlier = read_lines(options.out / "coverage_earlier.jsonl")
    write_tables(options.out, {"coverage_rounds": table(results.rows(), earlier)})


if __name__ == "__main__":
    _script.run(main)
