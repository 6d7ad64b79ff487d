"""Rows of the pool's value: a string task, an arm, a number of training rows and a seed, trained and measured."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax.io import open_pool
from lorafusion_jax.methods import Built, find, recipe_of
from lorafusion_jax.runs import generate_rows
from lorafusion_jax.tasks import (
    IGNORED,
    SEPARATE_TEXTS,
    Batch,
    Encoded,
    Example,
    Split,
    Task,
    TrainingRows,
    constant_answer,
    decode,
    draw_modules,
    encode,
    exact_match,
    pad,
)
from lorafusion_jax.training import fit, seed_entropies, start
from lorafusion_jax.trials import ResultRows

from .common import SMALL
from .string_pools import (
    TRAIN_ROWS,
    VALIDATION_ROWS,
    Rows,
    Target,
    design,
    pool_folder,
    test_rows,
    train_rows,
)
from .tuning import rates_at, tune

SEEDS = (1, 2, 3, 4, 5)
TUNING_SEEDS = (1, 2, 3)
DRAWS = (0, 1, 2)
MODULES = 20
TARGETS = {target.task.name: target for target in design().targets}
# Passes over the training rows: 40 steps of up to 10 rows, and 200 for 95 rows.
EPOCHS = {5: 40, 10: 40, 20: 20, 95: 20}
SOURCE_WIDTH = 12
TARGET_WIDTHS = (8, 16)

Row = dict[str, Any]
Entries = Sequence[tuple[int, Mapping[str, float]]]  # seeds with their rates
# Called after each epoch, with the problem and the test rows, leaves [seeds, rows, ...].


class Arm(NamedTuple):
    """A method, the pool that it fuses, numbers of its recipe, and the rates that its tuning starts from."""

    method: str
    pool: Literal["none", "real", "rotated", "shuffled-labels"] = "none"
    recipe: Mapping[str, Any] = {}
    rates: Mapping[str, float] = {}

    @property
    def draws(self) -> tuple[int, ...]:
        return DRAWS if self.pool == "rotated" else (0,)


_BOTH = {"lr_coefficients": 0.1, "lr_magnitudes": 0.01}
_BARE = {"lr_coefficients": 0.1}
FUSION = "LoRAFusion"
ROTATED = "rotated"
SHUFFLED = "shuffled labels"
SMALL_LORA = "LoRA, rank 1 on v"
BARE = "coefficients only"
BARE_ROTATED = "coefficients only, rotated"
ZERO = "zero-shot"
CONSTANT = "most frequent"
TRAINED = {
    FUSION: Arm("fusion", "real", rates=_BOTH),
    ROTATED: Arm("fusion", "rotated", rates=_BOTH),
    "magnitudes only": Arm("magnitudes", rates={"lr_magnitudes": 0.01}),
    SMALL_LORA: Arm(
        "lora", recipe={"lora_rank": 1, "lora_targets": ("v",)}, rates={"lr_lora": 6e-3}
    ),
    SHUFFLED: Arm("fusion", "shuffled-labels", rates=_BOTH),
    BARE: Arm("coefficients", "real", rates=_BARE),
    BARE_ROTATED: Arm("coefficients", "rotated", rates=_BARE),
    "LoRA, rank 16": Arm(
        "lora",
        recipe={"lora_rank": 16, "lora_targets": ("q", "v")},
        rates={"lr_lora": 2e-3},
    ),
}
ARMS = {ZERO: Arm("zero-shot"), CONSTANT: Arm("constant"), **TRAINED}


def cells(name: str, rows: int) -> list[tuple[Any, ...]]:
    """Return the keys of all rows of an arm, seeds of a task and draw together."""
    tasks = [task for task, target in TARGETS.items() if target.pool != "tuning"]
    everything = itertools.product(tasks, ARMS[name].draws, SEEDS)
    return [(name, rows, task, seed, draw) for task, draw, seed in everything]


def key_of(row: Row) -> tuple[Any, ...]:
    return (
        *(row[name] for name in ("arm", "rows", "task", "seed")),
        row.get("draw", 0),
    )


class Lab:
    """The base, its pools and the tokens of tasks; arms of equal shapes share their compiled programs."""

    arms: Mapping[str, Arm] = ARMS
    lanes = len(SEEDS)  # entries of a program

    def __init__(self, pools: Path):
        self.pools = pools
        self.tokenizer = lf.load_tokenizer(SMALL / "base")
        self.pad_id: Any = self.tokenizer.pad_token_id
        self.model = lf.load_base(SMALL / "base")
        self.model.config = dataclasses.replace(self.model.config, unroll=True)
        self.graph, self.base = nnx.split(self.model)
        of_few = functools.lru_cache(maxsize=12)
        self.problem = of_few(self._problem)
        self.pool = of_few(self._pool)
        self.tokens = of_few(self._tokens)

    def measure(
        self,
        name: str,
        target: Target,
        rows: int,
        entries: Entries,
        *,
        draw: int = 0,
        answer: bool = True,
    ) -> list[Row]:
        """Return a row for each entry, a seed with its rates; without `answer` no test row is answered."""
        if self.arms[name].method == "constant":
            return [self._constant(target, rows, seed) for seed, _ in entries]
        found: list[Row] = []
        for first in range(0, len(entries), self.lanes):
            part = entries[first : first + self.lanes]
            # Programs have one number of entries: the last one is repeated.
            filled = [*part, *[part[-1]] * (self.lanes - len(part))]
            found += self._measure(name, target, rows, filled, draw, answer)[
                : len(part)
            ]
        return found

    def _measure(
        self,
        name: str,
        target: Target,
        rows: int,
        entries: Entries,
        draw: int,
        answer: bool,
    ) -> list[Row]:
        problem = self.of_entries(name, target.pool, draw, entries)
        tokens, test, test_texts = self.tokens(target.task)
        own = np.array([[SEEDS.index(seed)] for seed, _ in entries], np.int32) * (
            TRAIN_ROWS + VALIDATION_ROWS
        )
        training = own + np.arange(rows, dtype=np.int32)
        for_all = jax.tree.map(
            lambda leaf: np.broadcast_to(leaf, (len(entries), *leaf.shape)), test
        )
        if name == ZERO:
            params = {}
            steps = 0
        else:
            validation = own + np.arange(
                TRAIN_ROWS, TRAIN_ROWS + VALIDATION_ROWS, dtype=np.int32
            )
            of_seeds = TrainingRows(tokens, Split(training, validation), self.pad_id)
            params, steps = self.trained(
                name, (target.pool, draw), problem, of_seeds, entries
            )
        losses = np.asarray(seed_entropies(params, for_all, problem))
        found: list[Row] = [
            {
                "numbers": self._numbers(name, problem),
                "steps": steps,
                "test_loss": round(float(loss), 5),
            }
            for loss in losses
        ]
        if name == ZERO:
            texts = (
                [part[i] for i in training.ravel()]
                for part in (tokens.inputs, tokens.labels)
            )
            batch = self._batch(*texts)
            by_seed = jax.tree.map(
                lambda leaf: leaf.reshape(len(entries), rows, *leaf.shape[1:]), batch
            )
            for row, loss in zip(
                found, np.asarray(seed_entropies(params, by_seed, problem)), strict=True
            ):
                row["training_rows_loss"] = round(float(loss), 5)
        if answer:
            how: Any = {
                "batch_size": len(test_texts),
                "max_new_tokens": test.labels.shape[1],
                "pad_id": self.pad_id,
            }
            prompts = tuple(
                ids[mask]
                for ids, mask in zip(test.input_ids, test.input_mask, strict=True)
            )
            said = generate_rows(
                params, lambda number: problem, Encoded(prompts, prompts), **how
            )
            for row, of_seed in zip(found, said, strict=True):
                texts = decode(self.tokenizer, of_seed, SEPARATE_TEXTS)
                row["exact_match"] = _percent(
                    texts, [text["completion"] for text in test_texts]
                )
        diverged = [n for n, loss in enumerate(losses) if not np.isfinite(loss)]
        if diverged:  # counts as the base does
            (base,) = self.measure(ZERO, target, rows, [(SEEDS[0], {})])
            for n in diverged:
                found[n] |= {"diverged": True} | {
                    part: base[part] for part in ("test_loss", "exact_match")
                }
        return found

    def trained(
        self,
        name: str,
        of_pool: tuple[str, int],
        problem: lf.Problem,
        rows: TrainingRows,
        entries: Entries,
    ) -> tuple[Any, int]:
        """Return the parameters of an arm for each entry, and the number of steps."""
        return self.fitted(name, problem, rows, entries)

    def of_entries(
        self, name: str, pool: str, draw: int, entries: Entries
    ) -> lf.Problem:
        """Return the problem of an arm with the modules of the entries' seeds."""
        problem = self.problem(name, pool, draw)
        return problem.replace(
            index=problem.index[np.array([SEEDS.index(seed) for seed, _ in entries])]
        )

    def fitted(
        self,
        name: str,
        problem: lf.Problem,
        rows: TrainingRows,
        entries: Entries,
        *,
        share: float = 1.0,
        begin: Any = None,
    ) -> tuple[Any, int]:
        """Return the parameters of an arm after a share of its epochs, from `begin` on, and the number of steps."""
        recipe = recipe_for(self.arms[name], rows.split.train.shape[1])
        recipe = dataclasses.replace(recipe, epochs=round(share * recipe.epochs))
        recipes = [
            recipe_of(type(recipe), vars(recipe) | dict(rates)) for _, rates in entries
        ]
        by_group = [problem.method.learning_rates(one) for one in recipes]
        rates = jax.tree.map(
            lambda *numbers: jnp.array(numbers, jnp.float32), *by_group
        )
        seeds = tuple(seed for seed, _ in entries)
        state = fit(
            problem,
            rows,
            start(problem, seeds, begin),
            recipe,
            seeds,
            rates=rates,
        )
        return state.best, int(state.step[0])

    def _constant(self, target: Target, rows: int, seed: int) -> Row:
        def example(row: Mapping[str, str]) -> Example:
            return Example(row["context"], row["completion"])

        train = tuple(map(example, train_rows(target.task, seed)[:rows]))
        wanted = [row["completion"] for row in test_rows(target.task)]
        said = constant_answer(Task(target.task.name, train, (), ""))
        return {
            "numbers": 0,
            "steps": 0,
            "exact_match": _percent([said] * len(wanted), wanted),
        }

    def _numbers(self, name: str, problem: lf.Problem) -> int:
        one = problem.replace(index=problem.index[0])
        return sum(
            int(jnp.sum(acting))
            for acting in jax.tree.leaves(one.trainable(one.init(jax.random.key(0))))
        )

    def _problem(self, name: str, pool_name: str, draw: int) -> lf.Problem:
        """Return the problem of all seeds."""
        arm = self.arms[name]
        pool = None
        index = np.zeros((len(SEEDS), 0), np.int32)
        if arm.pool != "none":
            pool, index = self.pool(arm.pool, pool_name, draw)
        recipe: Any = recipe_for(arm, TRAIN_ROWS)
        method = find(arm.method).build(
            Built(self.model.config, recipe, pool, index.shape[1])
        )
        frozen = method.precompute(lf.Frozen(self.base, pool), lf.kernels(self.model))
        return lf.Problem(
            graph=self.graph,
            method=method,
            frozen=frozen,
            index=jnp.asarray(index),
            seed_mode="sequential",
        )

    def _pool(self, kind: str, name: str, draw: int) -> tuple[lf.LoraPool, np.ndarray]:
        """Return a pool and the modules of each seed; of a rotated pool, each seed has a copy of its own."""
        folder = pool_folder(self.pools, name, shuffled=kind == "shuffled-labels")
        pool = open_pool(folder, str(SMALL / "base")).load()
        index = np.array(
            [pool.indices(draw_modules(pool.names, MODULES, seed)) for seed in SEEDS],
            np.int32,
        )
        if kind == "rotated":
            keys = jnp.stack(
                [jax.random.fold_in(jax.random.key(seed), draw) for seed in SEEDS]
            )
            copies = jax.jit(
                lambda pool, keys: jax.lax.map(
                    functools.partial(lf.rotated_pool, pool), keys
                )
            )(pool, keys)
            index += len(pool) * np.arange(len(SEEDS), dtype=np.int32)[:, None]
            pool = jax.tree.map(lambda leaf: jnp.concatenate([*leaf], axis=1), copies)
        # Names are part of a compiled program's key, so all pools get the same.
        names = tuple(map(str, range(next(iter(pool.rank.values())).shape[1])))
        return dataclasses.replace(pool, names=names, scaling=None), index

    def _tokens(self, task: Any) -> tuple[Encoded, Batch, Rows]:
        """Return the tokens of all seeds' rows, the test rows as one batch, and their texts."""
        texts = [row for seed in SEEDS for row in train_rows(task, seed)]
        test = test_rows(task)

        def tokens(rows: Rows) -> Encoded:
            return encode(
                self.tokenizer,
                [Example(row["context"], row["completion"]) for row in rows],
            )

        train = tokens(texts)
        held_out = tokens(test)
        longest = max(
            len(labels) for part in (train, held_out) for labels in part.labels
        )
        width = next(width for width in TARGET_WIDTHS if width >= longest)
        # Labels of one width for all rows, so that tasks share programs.
        labels = tuple(
            np.pad(row, (0, width - len(row)), constant_values=IGNORED)
            for row in train.labels
        )
        padded = tuple(
            np.pad(row, (0, width - len(row)), constant_values=IGNORED)
            for row in held_out.labels
        )
        return Encoded(train.inputs, labels), self._batch(held_out.inputs, padded), test

    def _batch(
        self, inputs: Sequence[np.ndarray], labels: Sequence[np.ndarray]
    ) -> Batch:
        ids = pad(inputs, self.pad_id, SOURCE_WIDTH)
        mask = np.arange(SOURCE_WIDTH) < np.array([len(row) for row in inputs])[:, None]
        return Batch(
            ids, mask, np.stack(labels).astype(np.int32), np.ones(len(ids), bool)
        )


def recipe_for(arm: Arm, rows: int) -> Any:
    shared = {"epochs": EPOCHS[rows], "modules": MODULES, "pack": False}
    return recipe_of(find(arm.method).recipe, shared | dict(arm.recipe))


def _percent(texts: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of exact matches."""
    return 100 * float(exact_match([texts], wanted).mean())


def run(
    lab: Lab,
    keys: Sequence[tuple[Any, ...]],
    file: Path,
    begin: Mapping[str, float],
    *,
    together: bool = False,
) -> None:
    """Measure the missing cells of an arm at a number of training rows; its rates are tuned before, from `begin` on."""
    everything = ResultRows(file, key_of)
    if not everything.missing(keys):
        return
    name, rows = keys[0][:2]
    rates = (
        _tuned(lab, name, rows, file.with_name("tune.jsonl"), begin, together)
        if begin
        else {}
    )

    def measure(missing: Sequence[tuple[Any, ...]]) -> Iterator[Row]:
        for (task, draw), of_seeds in itertools.groupby(
            missing, key=lambda key: (key[2], key[4])
        ):
            began = time.process_time()
            seeds = [key[3] for key in of_seeds]
            target = TARGETS[task]
            found = lab.measure(
                name, target, rows, [(seed, rates) for seed in seeds], draw=draw
            )
            seconds = round((time.process_time() - began) / len(seeds), 2)
            of_target = {"pool": target.pool, "relevance": target.relevance}
            for seed, cell in zip(seeds, found, strict=True):
                key = {
                    "arm": name,
                    "rows": rows,
                    "task": task,
                    "seed": seed,
                    "draw": draw,
                }
                yield (
                    key | of_target | {"rates": rates} | cell | {"cpu_seconds": seconds}
                )

    everything.fill(
        keys, measure, lambda row: f"{key_of(row)}: {row['cpu_seconds']:.2f} CPU s"
    )


def _tuned(
    lab: Lab,
    name: str,
    rows: int,
    file: Path,
    begin: Mapping[str, float],
    together: bool,
) -> dict[str, float]:
    """Return the rates of an arm with the least mean test loss on the tuning tasks, at no edge of the tried ones."""

    def measure(missing: Sequence[tuple[Any, ...]]) -> Iterator[Row]:
        for task, keys in itertools.groupby(missing, key=lambda key: key[3]):
            points = [key[2] for key in keys]
            entries = [
                (seed, rates_at(begin, point))
                for point in points
                for seed in TUNING_SEEDS
            ]
            losses = [
                cell["test_loss"]
                for cell in lab.measure(
                    name, TARGETS[task], rows, entries, answer=False
                )
            ]
            for point, own in zip(
                points,
                np.reshape(losses, (len(points), len(TUNING_SEEDS))),
                strict=True,
            ):
                key = {
                    "arm": name,
                    "rows": rows,
                    "task": task,
                    "relevance": TARGETS[task].relevance,
                }
                rates = {"point": point, "rates": rates_at(begin, point)}
                yield key | rates | {"test_loss": round(float(own.mean()), 5)}

    over = [(task,) for task, target in TARGETS.items() if target.pool == "tuning"]
    trials = ResultRows(
        file, lambda row: (row["arm"], row["rows"], tuple(row["point"]), row["task"])
    )
    return tune(trials, (name, rows), begin, over, measure, together=together)
