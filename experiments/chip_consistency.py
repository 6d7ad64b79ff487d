"""Consistency between chips on unlabelled rows: does a basis trained on five examples stand noise better for it?

    python experiments/chip_consistency.py                # 3 tasks x 3 seeds x 4 chips, 32 directions

Of five labelled rows and 95 without labels, a fusion of drawn modules is trained on another chip at every step: on the
labelled rows alone (fresh noise), or also so that two chips agree on as many unlabelled rows (consistency), as in
R-Drop (Liang et al., 2021), with chips in place of dropout. The answers that the chips are to agree on, token by token,
are those of the numbers that were trained digitally on the five. Written to the folder: table.md, rows.csv, every row
and trained number; interrupted, the same command goes on.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _script
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from _common import ROOT, TRAIN_ROWS, recipe_of
from _hardware import Row, Store, Subject, check, csv_of, slug, subject
from _methods import IN_BASIS
from jaxtyping import Array, Float

from lorafusion_jax import Recipe
from lorafusion_jax.columns import markdown
from lorafusion_jax.crossbar import config_hash
from lorafusion_jax.hardware.folder import load_chips
from lorafusion_jax.report import write_text
from lorafusion_jax.runs.evaluate import generate_seeds
from lorafusion_jax.tasks import Batch, batch_orders, train_batches
from lorafusion_jax.tasks.batches import IGNORED
from lorafusion_jax.training.fit import recipe_rates, start
from lorafusion_jax.training.loss import batch_logits, objective, rows
from lorafusion_jax.training.problem import Params, Problem
from lorafusion_jax.training.recipe import Rates

_AGREEING = 5  # unlabelled rows of a step
_PLAIN, _LONGER = "fresh noise, 40 steps", "fresh noise, 120 steps"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurements.

    Attributes:
      basis: number of directions.
      weights: of the disagreement in the loss.
      tasks: of the embedded ones.
      seeds: each draws modules, starts and orders of rows.
      chips: how many are read.
      crossbar: configuration of the arrays.
      test_rows: evaluate on the first rows only.
      out: folder of results; what is there already is not computed again.
    """

    basis: int = 32
    weights: tuple[float, ...] = (0.3, 1.0, 3.0)
    tasks: tuple[str, ...] = ("swapends_prev", "pairswap_numvow", "sort_next2")
    seeds: tuple[int, ...] = (1, 2, 3)
    chips: int = 4
    crossbar: str = str(ROOT / "examples" / "chip.yaml")
    test_rows: int | None = None
    out: Path = ROOT / "runs" / "chip_consistency"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    check(options.chips, tasks=options.tasks, seeds=options.seeds)
    store = Store(options.out)
    settings = dataclasses.asdict(options) | {"config": config_hash(load_chips(options.crossbar).config)}
    apart = ("out", "weights", "tasks", "crossbar")
    store.claim({name: value for name, value in settings.items() if name not in apart})
    found = [{"task": task, **row} for task in options.tasks for row in task_rows(store, task, options)]
    write_text(options.out / "table.md", table(found, options))
    write_text(options.out / "rows.csv", csv_of(found))
    print(f"{table(found, options)}\nwritten to {options.out}")


def task_rows(store: Store, task: str, options: Options) -> Iterator[Row]:
    """Yield the rows of a task: case, chip, seed, exact match (percent), loss."""
    chips = load_chips(options.crossbar)
    entry = dataclasses.replace(IN_BASIS["basis"], recipe={"basis": options.basis})
    recipe = recipe_of(entry, league="5")
    on = subject(
        store,
        task,
        f"k = {options.basis}",
        entry,
        seeds=options.seeds,
        league="5",
        epochs=recipe.epochs,
        chips=chips,
        count=options.chips,
        test_rows=options.test_rows,
    )
    longer = dataclasses.replace(recipe, epochs=3 * recipe.epochs)
    cases = {
        "untouched": lambda: on.params,
        _PLAIN: lambda: on.train_on_fresh_chips(chips.config, recipe),
        # As many forward rows as the consistency's steps, which pass five rows on one chip and five on two.
        _LONGER: lambda: on.train_on_fresh_chips(chips.config, longer),
    } | {f"consistency, weight {weight:g}": partial(agreeing, on, recipe, weight) for weight in options.weights}
    for row in store.rows(slug(f"{task}-digital"), lambda: on.score_digitally(on.params)):
        yield {"case": "digital", **row}
    for case, train in cases.items():
        name = slug(f"{task}-{case}")

        def scored(name: str = name, train: Any = train) -> list[Row]:
            return on.score(chips.config, store.numbers(name, train))

        yield from ({"case": case, **row} for row in store.rows(name, scored))


def agreeing(on: Subject, recipe: Recipe, weight: float) -> Params:
    """Return numbers of every seed, trained on labelled rows and on the agreement of two chips about others."""
    fresh, seeds = on.on_fresh_chips(on.chips.config), on.options.seeds
    orders = batch_orders(fresh.rows.split.train, batch_size=recipe.batch_size, epochs=recipe.epochs, seeds=seeds)
    labelled = list(train_batches(fresh.train, orders, pad_id=fresh.rows.pad_id))
    answered = answers(on)
    state = start(fresh.problem, seeds)
    state = (state.params, jax.vmap(_ADAM.init)(state.params))
    rates = recipe_rates(fresh.problem.method, recipe, len(seeds))
    rng = np.random.default_rng(0)
    for number, batch in enumerate(labelled):
        chosen = rng.permuted(np.tile(np.arange(answered.labels.shape[1]), (len(seeds), 1)), axis=1)[:, :_AGREEING]
        others = jax.tree.map(lambda leaf, rows=chosen: np.take_along_axis(leaf, _like(rows, leaf), axis=1), answered)
        share = 0.5 * (1 + np.cos(np.pi * number / len(labelled)))  # the recipe's cosine
        state = _step(state, batch, others, fresh.problem, rates, np.int32(number), np.float32(share), weight=weight)
    return jax.block_until_ready(state[0])


def answers(on: Subject) -> Batch:
    """Return the task's rows beyond the labelled ones, [seeds, rows, ...], with each seed's own digital answers."""
    setup, seeds = on.setup, len(on.options.seeds)
    assert setup.split is not None
    taken = np.concatenate([setup.split.train, setup.split.validation], axis=1)
    rest = [np.setdiff1d(np.arange(len(setup.train)), of_seed) for of_seed in taken]
    order = np.stack([of_seed[: min(map(len, rest))] for of_seed in rest]).astype(np.int32)[:, None]
    whole = next(train_batches(setup.train, order, pad_id=setup.tokenizer.pad_token_id))
    said = []
    for s in range(seeds):
        batch = jax.tree.map(lambda leaf, s=s: jnp.asarray(leaf[s]), whole)
        of_all = generate_seeds(on.params, batch, setup.problem, max_new_tokens=whole.labels.shape[2])
        said.append(np.asarray(of_all)[s])
    ids = np.stack(said)
    ended = np.cumsum(ids == setup.config.eos_id, axis=2) - (ids == setup.config.eos_id) > 0
    return whole._replace(labels=np.where(ended, IGNORED, ids).astype(np.int32))


def _like(rows: np.ndarray, leaf: np.ndarray) -> np.ndarray:
    return rows.reshape(*rows.shape, *[1] * (leaf.ndim - 2))


_ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


@partial(jax.jit, static_argnames="weight")
def _step(
    state: tuple[Params, Any],
    labelled: Batch,
    others: Batch,
    problem: Problem,
    rates: Rates,
    number: Array,
    share: Array,
    *,
    weight: float,
) -> tuple[Params, Any]:
    def of_seed(one: Problem, state: tuple[Params, Any], labelled: Batch, others: Batch, rates: Rates) -> Any:
        params, adam = state
        here, there = (
            one.replace(frozen=one.frozen.of_step(2 * number + chip, one.graph))
            for chip in (jnp.int32(0), jnp.int32(1))
        )

        def loss(params: Params) -> Array:
            of_labels = objective(params, labelled, here, jnp.float32(0))[0]
            return of_labels + weight * disagreement(params, others, here, there) / rows(labelled.row_mask)

        updates: Any
        updates, adam = _ADAM.update(jax.grad(loss)(params), adam)
        moved = {
            group: jax.tree.map(lambda p, u, r=rates.learning_rate[group]: p - r * share * u, params[group], of_group)
            for group, of_group in updates.items()
        }
        return moved, adam

    return problem.over_seeds(of_seed, (state, labelled, others, rates))


def disagreement(params: Params, batch: Batch, here: Problem, there: Problem) -> Float[Array, ""]:
    """Return the mean symmetric Kullback-Leibler divergence of two chips' tokens, in nats per token."""
    p, q = (jax.nn.log_softmax(batch_logits(params, batch, chip)[0]) for chip in (here, there))
    of_tokens = jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=2) / 2
    real = batch.labels != IGNORED
    count = jnp.maximum(jnp.sum(real), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(real, of_tokens, 0.0)) / count


def table(found: Sequence[Row], options: Options) -> str:
    """Return exact match by case and task, and the mean of chips with its deviation."""
    lines = [["exact match, %", *options.tasks, "mean"]]
    for case in dict.fromkeys(row["case"] for row in found):
        of_case = [row for row in found if row["case"] == case]
        by_task = [np.mean([r["exact_match"] for r in of_case if r["task"] == task]) for task in options.tasks]
        chips = sorted({row["chip"] for row in of_case})
        of_chips = [np.mean([row["exact_match"] for row in of_case if row["chip"] == chip]) for chip in chips]
        spread = f" ± {np.std(of_chips, ddof=1):.1f}" if len(chips) > 1 else ""
        lines.append([case, *(f"{mean:.1f}" for mean in by_task), f"{np.mean(of_chips):.1f}{spread}"])
    return (
        f"Basis of {options.basis}, {TRAIN_ROWS['5']} labelled rows, {len(options.seeds)} seeds, {options.chips} "
        f"chips; ± between chips.\n\n{markdown(lines)}"
    )


if __name__ == "__main__":
    _script.run(main)
