"""Are the intervals and sentences of `lorafusion trial` right? The whole procedure on made-up tasks with known truth.

    python experiments/trial_coverage.py                # 200 tasks, 15 minutes of one core
    python experiments/trial_coverage.py --first 2000 --out runs/trial_coverage    # other tasks, to choose rules with

A task is softmax regression: a base, modules, a useless rotation of them, and rows. The arms train by Adam as those of
the package do; `procedure` tunes and cross-validates them, and `judge` names one. The truth is the loss on fresh rows
of arms that are trained on all rows with the tuned rates. `trial_coverage.md` is the design.
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
from scipy import stats

from lorafusion_jax.trials import (
    Cells,
    Outcomes,
    Row,
    Scores,
    Training,
    TrialArm,
    judge,
    procedure,
)

SIZES = (20, 40, 80, 160)  # the last one only for what doubling decides
CLASSES = 8
FEATURES = 24
TOKENS = 3
MODULES = 6
FRESH = 3_000  # rows for the truth
STEPS = 40
SHOTS = 5
LANES = 8  # trainings of one program
DRAWS = (1, 2, 3)

_BOTH = {
    "rates": {"magnitudes": 0.03, "coefficients": 0.05},
    "parameters": FEATURES + MODULES,
}
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
    TrialArm(name="pool", role="pool", **_BOTH),
    TrialArm(name="rotated", role="control", draws=DRAWS, **_BOTH),
    TrialArm(
        name="LoRA", role="lora", rates={"lora": 0.02}, parameters=CLASSES * FEATURES
    ),
)


class Task(NamedTuple):
    """A made-up task. Rows behind the first ones are fresh.

    Attributes:
      base: weights that all arms start from.
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
    groups: tuple[int, ...]


def draw(number: int, rows: int) -> Task:
    """Return a task; what the pool, magnitudes and other weights contribute is drawn too."""
    rng = np.random.default_rng([54, number])
    scale = rng.uniform(1, 4)
    change = rng.choice([0.0, 1.0], p=[0.1, 0.9]) * rng.uniform(0.5, 4)
    bias = rng.choice([0.0, 1.0]) * rng.uniform(1, 5)
    parts = rng.dirichlet([0.5, 0.3, 0.5])
    repeats = rng.choice([0.0, 0.3])

    def unit(weights: np.ndarray) -> np.ndarray:
        return (
            weights / np.linalg.norm(weights) * np.sqrt(CLASSES)
        )  # logits have a variance of one

    shape = (CLASSES, FEATURES)
    base = scale * unit(rng.normal(size=shape))
    modules = np.stack(
        [
            unit(rng.normal(size=(CLASSES, 2)) @ rng.normal(size=(2, FEATURES)))
            for _ in range(MODULES)
        ]
    )
    weights = rng.normal(size=MODULES) * rng.choice([1.0, 0.2], size=MODULES)
    directions = (
        np.tensordot(weights, modules, 1),
        base * rng.normal(size=FEATURES),
        rng.normal(size=shape),
    )
    best = base + change * sum(
        np.sqrt(part) * unit(one) for part, one in zip(parts, directions, strict=True)
    )
    base[:, 0] = bias * rng.normal(
        size=CLASSES
    )  # a wrong format of answers, which every training corrects soon
    best[:, 0] = base[:, 0] * rng.uniform(0, 1)
    rotated = [
        modules @ np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0] for _ in DRAWS
    ]

    source = np.arange(rows + FRESH)  # row that has the same input
    again = 1 + np.flatnonzero(rng.random(rows - 1) < repeats)
    for row in again:
        source[row] = source[rng.integers(row)]
    shared = rng.normal(size=(len(source), 1, FEATURES)) + rng.normal(
        size=(len(source), TOKENS, FEATURES)
    )
    inputs = (shared / np.sqrt(2))[source]
    inputs[:, :, 0] = 1
    mask = (np.arange(TOKENS) < rng.integers(1, TOKENS + 1, size=(len(source), 1)))[
        source
    ]
    logits = inputs @ best.T
    answers = np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1)
    return Task(
        base,
        best,
        np.stack([modules, *rotated]),
        inputs,
        mask,
        answers,
        tuple(source[:rows].tolist()),
    )


class Lane(NamedTuple):
    """A training: its rows, modules and rates; rows that are shown as examples; whether it chooses one module."""

    train: Any
    draw: Any
    rates: Any
    share: Any
    shown: Any
    single: Any


def lane(one: Training, rows: int) -> Lane:
    train = np.zeros(rows, np.float32)
    shown = np.zeros(rows, np.float32)
    train[list(one.train)] = 1
    if one.arm == "examples":
        shown[list(one.train[:SHOTS])] = 1
    rates = dict.fromkeys(("coefficients", "magnitudes", "lora"), np.float32(0)) | dict(
        one.rates
    )
    return Lane(
        train,
        one.draw,
        rates,
        np.float32(one.share),
        shown,
        np.float32(one.arm == "single"),
    )


def logits_of(
    weights: Mapping[str, Any], base: Any, modules: Any, inputs: Any
) -> Array:
    matrix = base + jnp.tensordot(weights["coefficients"], modules, 1) + weights["lora"]
    return (inputs * (1 + weights["magnitudes"])) @ matrix.T


@jax.jit
def train(
    lanes: Lane, base: Array, modules: Array, inputs: Array, mask: Array, answers: Array
) -> Any:
    """Return the trained weights of each lane, and the loss and match of each row."""

    def one(lane: Lane) -> Any:
        own = modules[lane.draw]

        def losses(weights: Mapping[str, Array]) -> Array:
            logp = jax.nn.log_softmax(logits_of(weights, base, own, inputs))
            return -jnp.sum(
                jnp.take_along_axis(logp, answers[..., None], axis=-1)[..., 0] * mask,
                axis=-1,
            )

        def loss(weights: Mapping[str, Array], rows: Array) -> Array:
            return jnp.sum(losses(weights) * rows) / jnp.maximum(
                jnp.sum(rows * mask.sum(axis=-1)), 1
            )

        zero = {
            "coefficients": jnp.zeros(MODULES),
            "magnitudes": jnp.zeros(FEATURES),
            "lora": jnp.zeros((CLASSES, FEATURES)),
        }
        of_module = jax.vmap(
            lambda vector: loss(zero | {"coefficients": vector}, lane.train)
        )(jnp.eye(MODULES))
        start = zero | {
            "coefficients": lane.single * jax.nn.one_hot(jnp.argmin(of_module), MODULES)
        }
        # Examples in the prompt count as one step of gradient descent (von Oswald et al., 2023).
        start["lora"] = -jax.grad(loss)(zero, lane.shown)["lora"]
        steps = jnp.round(STEPS * lane.share)

        def step(carry: Any, number: Array) -> tuple[Any, None]:
            weights, first, second = carry
            grad = jax.grad(loss)(weights, lane.train)
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grad)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grad)
            decay = jnp.clip(1 - number / steps, 0)
            count = number + 1

            def moved(w: Array, m: Array, v: Array, rate: Array) -> Array:
                return w - rate * decay * m / (1 - 0.9**count) / (
                    jnp.sqrt(v / (1 - 0.999**count)) + 1e-8
                )

            return (
                jax.tree.map(moved, weights, first, second, lane.rates),
                first,
                second,
            ), None

        none = jax.tree.map(jnp.zeros_like, zero)
        weights = jax.lax.scan(step, (start, none, none), jnp.arange(STEPS))[0][0]
        right = (
            jnp.argmax(logits_of(weights, base, own, inputs), axis=-1) == answers
        ) | ~mask
        return weights, losses(weights), jnp.all(right, axis=-1)

    return jax.vmap(one)(lanes)


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
        lanes = [lane(one, rows) for one in part]
        stacked = jax.tree.map(
            lambda *leaves: np.stack(leaves), *lanes, *lanes[-1:] * (LANES - len(part))
        )
        found = jax.device_get(
            train(stacked, *arrays, task.mask[:rows], task.answers[:rows])
        )
        for place, one in enumerate(part):
            yield one, jax.tree.map(lambda leaf, place=place: leaf[place], found)


def truth(task: Task, rows: int, outcomes: Outcomes) -> dict[str, float]:
    """Return the loss on fresh rows of each arm that is trained on all rows; controls are averaged over draws."""
    every = tuple(range(rows))
    chosen = {name: tuned[:2] for name, tuned in outcomes.tuned.items()}
    trainings = [
        Training(
            arm.name,
            number,
            *chosen.get(arm.name, ((), 1.0)),
            every if arm.learns else (),
            every,
        )
        for arm in ARMS
        for number in arm.draws
    ]
    inputs = task.inputs[-FRESH:]
    mask = task.mask[-FRESH:]
    chances = jax.nn.softmax(inputs @ task.best.T)
    found: dict[str, list[float]] = {}
    for one, (weights, _, _) in trained(task, rows, trainings):
        logp = jax.nn.log_softmax(
            logits_of(weights, task.base, task.modules[one.draw], inputs)
        )
        found.setdefault(one.arm, []).append(
            -float(jnp.sum(jnp.sum(chances * logp, axis=-1) * mask) / mask.sum())
        )
    return {name: round(float(np.mean(losses)), 4) for name, losses in found.items()}


def measured(number: int, rows: int) -> Row:
    """Return the row of a task with some rows: its verdict, what was decided after each look, and the truth."""
    task = draw(number, SIZES[-1])
    tokens = task.mask[:rows].sum(axis=-1).mean()

    def measure(trainings: Sequence[Training]) -> Iterator[Scores]:
        for one, (_, losses, right) in trained(task, rows, trainings):
            yield Scores(losses[list(one.test)] / tokens, right[list(one.test)])

    looks = list(
        procedure(ARMS, task.groups[:rows], measure, seed=number, by_fold=True)
    )
    *earlier, found = map(judge, looks)
    return {
        "task": number,
        "rows": rows,
        "decision": found.decision,
        "arm": found.arm,
        "sentence": found.sentence,
        "needed": found.rows,
        "contrasts": {
            one.arm: [round(end, 4) for end in one.loss] for one in found.contrasts
        },
        "looks": [[one.decision, one.arm] for one in (*earlier, found)],
        "truth": truth(task, rows, looks[-1]),
    }


def share(hits: Sequence[bool]) -> str:
    """Return a percentage with its exact binomial interval (Clopper and Pearson, 1934), and the number of cases."""
    if not hits:
        return "-"
    count = len(hits)
    right = sum(hits)
    low = stats.beta.ppf(0.025, right, count - right + 1) if right else 0.0
    high = stats.beta.ppf(0.975, right + 1, count - right) if right < count else 1.0
    return f"{100 * right / count:.1f} ({100 * low:.1f} to {100 * high:.1f}) of {count}"


def figures(
    own: Sequence[Row], at: Mapping[tuple[int, int], Row]
) -> dict[str, list[bool]]:
    """Return what holds for each of some rows; `at` has the rows by task and number of rows."""

    def worse(row: Row, margin: float, arm: str | None = None) -> bool:
        return row["truth"][arm or row["arm"]] - min(row["truth"].values()) > margin

    def covers(row: Row, arm: str) -> bool:
        _, low, high = row["contrasts"][arm]
        return low <= row["truth"][arm] - row["truth"]["pool"] <= high

    decided = {
        kind: [row for row in own if row["decision"] == kind]
        for kind in ("named", "close", "more")
    }
    early = [[arm for kind, arm in row["looks"][:-1] if kind == "named"] for row in own]
    names = [[arm for kind, arm in row["looks"] if kind == "named"] for row in own]
    more = decided["more"]
    doubled = [at[row["task"], 2 * row["rows"]]["decision"] for row in more]
    sizes = [
        (row["task"], [size for size in SIZES if size >= row["needed"]]) for row in more
    ]
    return {
        **{
            f"interval covers, {arm.name} minus pool": [
                covers(row, arm.name) for row in own
            ]
            for arm in ARMS
            if arm.role != "pool"
        },
        "an arm is named": [row["decision"] == "named" for row in own],
        "no clear winner, but a best arm so far": [
            row["decision"] == "close" for row in own
        ],
        "more rows are needed": [row["decision"] == "more" for row in own],
        "an arm is named that is more than 0.05 nats worse than the best": [
            row["decision"] == "named" and worse(row, 0.05) for row in own
        ],
        "the same, of named arms": [worse(row, 0.05) for row in decided["named"]],
        "the best arm so far is more than 0.05 nats worse": [
            worse(row, 0.05) for row in decided["close"]
        ],
        "the best arm so far is more than 0.3 nats worse": [
            worse(row, 0.3) for row in decided["close"]
        ],
        "an earlier look than the last names an arm": [bool(arms) for arms in early],
        "any of five looks names an arm that is more than 0.05 nats worse": [
            any(worse(row, 0.05, arm) for arm in arms)
            for row, arms in zip(own, names, strict=True)
        ],
        "doubling decides if more rows are needed": [
            kind != "more" for kind in doubled
        ],
        "doubling names an arm if more rows are needed": [
            kind == "named" for kind in doubled
        ],
        "the stated number decides if it is at most 160": [
            at[task, min(enough)]["decision"] != "more"
            for task, enough in sizes
            if enough
        ],
    }


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return a line for each figure, and columns for each number of rows and for all but the largest."""
    at = {(row["task"], row["rows"]): row for row in rows}
    groups = [
        [row for row in rows if row["rows"] in sizes]
        for sizes in (*zip(SIZES[:-1]), SIZES[:-1])
    ]
    columns = [figures(own, at) for own in groups]
    heading = ["share, %", *(f"{size} rows" for size in SIZES[:-1]), "all"]
    return [
        heading,
        *([name, *(share(column[name]) for column in columns)] for name in columns[0]),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options.

    Attributes:
      tasks: number of tasks.
      first: number of the first task.
      out: folder of the rows and the table.
    """

    tasks: int = 200
    first: int = 10_400
    out: Path = ROOT / "results" / "trial"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    numbers = range(options.first, options.first + options.tasks)
    cells = Cells(
        options.out / "coverage.jsonl", lambda row: (row["task"], row["rows"])
    )
    keys = [(number, rows) for number in numbers for rows in SIZES]
    cells.fill(
        keys,
        lambda missing: (measured(*key) for key in missing),
        lambda row: f"{row['task']}: {row['sentence']}",
    )
    own = [row for row in cells.rows() if row["task"] in numbers]
    write_tables(options.out, {"coverage": table(own)})


if __name__ == "__main__":
    _script.run(main)
