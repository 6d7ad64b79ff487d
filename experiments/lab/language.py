"""Tasks of real language and their roles: sources of the pool, tasks to tune on, unseen ones; and the rows of tables.

All are function-vector data sets (Todd et al., ICLR 2024; github.com/ericwtodd/function_vectors, MIT, the folder
dataset_files), other than the inflections, which are in examples/smollm2/tasks.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lorafusion_jax import FuseOptions
from lorafusion_jax.methods import find as find_method
from lorafusion_jax.report import write_text
from lorafusion_jax.runs import Setup
from lorafusion_jax.tasks import (
    Batch,
    Example,
    Task,
    batch_orders,
    load_task,
    train_batches,
)
from lorafusion_jax.training import LOSS, Params, seed_entropies

from .matrix import Arm, recipe_of
from .methods import ARMS, IN_BASIS
from .smollm2 import EXAMPLES
from .tasks import find_task

PROMPT = "Q: {input}\nA:"
TRAIN_ROWS = 100
TEST_ROWS = 200
LEAST_TEST_ROWS = 75
MOST_SHARED = 0.05  # of an unseen task's test pairs, by the training rows of one source
EVALUATED_ROWS = 100  # all in one batch
NEW_TOKENS = 12  # more than 99 % of all answers have
# Training rows of a source's adapter, and passes over them: 30 steps of 16 rows, in one program for all sources.
SOURCE_ROWS = {500: 1, 250: 2, 166: 3, 100: 5}

SOURCES = {
    "words": ("past", "plural", "comparative", "next_item"),
    "translation": ("english-french",),
    "knowledge": (
        "country-capital",
        "national_parks",
        "person-instrument",
        "person-occupation",
        "product-company",
    ),
    "letters": (
        "capitalize",
        "capitalize_first_letter",
        "capitalize_last_letter",
        "lowercase_first_letter",
        "next_capital_letter",
    ),
    "extraction": (
        "adjective_v_verb_3",
        "verb_v_adjective_5",
        "animal_v_object_3",
        "color_v_animal_5",
        "concept_v_object_3",
        "object_v_concept_5",
        "fruit_v_animal_5",
        "choose_first_of_3",
        "choose_last_of_3",
    ),
}
# Another draw of as many, to see what depends on it: twelve of these, drawn, and the other data sets that are long
# enough, except for one like an unseen task, of five words, not three (alphabetically_first_5).
SECOND_SOURCES = {
    "words": ("past", "comparative", "present-past"),
    "knowledge": (
        "country-capital",
        "national_parks",
        "person-instrument",
        "person-occupation",
        "product-company",
    ),
    "letters": ("lowercase_first_letter",),
    "extraction": (
        "animal_v_object_3",
        "color_v_animal_5",
        "concept_v_object_3",
        "choose_first_of_3",
        "adjective_v_verb_5",
        "verb_v_adjective_3",
        "animal_v_object_5",
        "color_v_animal_3",
        "concept_v_object_5",
        "object_v_concept_3",
        "choose_first_of_5",
        "choose_middle_of_3",
        "choose_middle_of_5",
        "choose_last_of_5",
        "alphabetically_last_5",
    ),
}
POOLS = {"first": SOURCES, "second": SECOND_SOURCES}
TUNING = ("landmark-country", "capitalize_second_letter")
# What the pool holds for an unseen task: a near relative (another language or direction), only others of its family, or
# none of its kind. Two tasks of earlier rows are none of these, since a source has many of their test pairs:
# lowercase_last_letter (capitalize_last_letter, as case does not count) and alphabetically_first_3 (choose_last_of_3,
# wherever the last word is also the first in the alphabet).
UNSEEN = {
    "near": {"english-spanish": "translation", "prev_item": "words"},
    "far": {"country-currency": "knowledge", "person-sport": "knowledge"},
    "none": {"sentiment": "sentiment", "word_length": "counting", "synonym": "meaning"},
}

# Passes over the training rows: 500 rows in all (475 where five are held out), and 200 from five examples.
EPOCHS = {100: 5, 20: 25, 5: 40}
DIRECTIONS = 32  # of the pool's shared basis
_ALL = {"modules": sum(map(len, SOURCES.values()))}
_FUSION = {"lr_coefficients": 0.01, "lr_magnitudes": 0.1}


def _entry(entry: Arm, rates: dict[str, float] | None = None, **recipe: Any) -> Arm:
    return dataclasses.replace(
        entry, recipe=entry.recipe | _ALL | recipe, rates=rates or {}, few_rates={}
    )


_COEFFICIENTS = _entry(ARMS["coefficients only"], {"lr_coefficients": 0.05})

# Rows of the table, with the best of the first nine trials of `python experiments/tune.py`; bases have
# LoRAFusion's rates.
MAIN = {
    "zero-shot": ARMS["zero-shot"],
    "few-shot prompt": ARMS["few-shot prompt"],
    "uniform mean": _entry(ARMS["uniform mean"]),
    "best single module": _entry(ARMS["best single module"]),
    "LoRAFusion": _entry(ARMS["LoRAFusion"], _FUSION),
    "LoRA": dataclasses.replace(ARMS["LoRA"], rates={"lr_lora": 5e-3}, few_rates={}),
    "random pool": _entry(ARMS["random pool"], _FUSION),
    "coefficients only": _COEFFICIENTS,
    "magnitudes only": dataclasses.replace(
        ARMS["magnitudes only"], rates={"lr_magnitudes": 0.2}, few_rates={}
    ),
    "basis, k = 16": _entry(IN_BASIS["basis"], _FUSION, basis=16),
}
MORE = {
    "constant answer": ARMS["constant answer"],
    "coefficients only, random pool": dataclasses.replace(
        _COEFFICIENTS, control="random-factors", rates={"lr_coefficients": 1.0}
    ),
}


def options_of(
    entry: Arm,
    task: Path,
    *,
    base: Path,
    pool: Path,
    seeds: tuple[int, ...],
    train_rows: int = TRAIN_ROWS,
    adapters: tuple[str, ...] = (),
    **run: Any,
) -> FuseOptions:
    """Return the options of a row's run on a task.

    Args:
      entry: the row.
      task: its file or folder.
      base: the model.
      pool: a converted pool.
      seeds: that are one program.
      train_rows: rows to learn from.
      adapters: names of modules to fuse instead of all.
      run: other options, such as `out` and `name`.
    """
    numbers: dict[str, Any] = {
        "lora_rank": 8,
        "epochs": EPOCHS[train_rows],
        "max_new_tokens": NEW_TOKENS,
    }
    return FuseOptions(
        base=str(base),
        pool=str(pool) if find_method(entry.method).pool else None,
        task=str(task),
        prompt=PROMPT,
        method=entry.method,
        control=entry.control,
        adapters=adapters,
        recipe=recipe_of(entry, **numbers),
        seeds=seeds,
        train_rows=train_rows,
        test_rows=EVALUATED_ROWS,
        eval_batch=EVALUATED_ROWS,
        resume=True,
        **run,
    )


def find(name: str, folder: Path) -> Path:
    """Return the file or folder of a task; `folder` holds the function-vector data sets.

    Raises:
      ValueError: the task is not there.
    """
    own = EXAMPLES / "tasks" / name
    return own if own.is_dir() else find_task(folder, name)


class Unseen(NamedTuple):
    """A task without the test pairs that something was trained on; `left_out` counts those among the evaluated."""

    path: Path
    left_out: int


def trained_pairs(
    sources: Iterable[str], folder: Path
) -> dict[str, set[tuple[str, str]]]:
    """Return the pairs that trained the adapter of each source.

    Raises:
      ValueError: a source's task is not there.
    """
    paths = {name: find(name, folder) for name in sources}
    rows = {
        name: load_task(path, train_rows=source_rows(path), need=("train",))
        for name, path in paths.items()
    }
    return {name: set(map(pair, task.train)) for name, task in rows.items()}


def unseen(
    path: Path,
    trained: Mapping[str, set[tuple[str, str]]],
    out: Path,
    train_rows: int = TRAIN_ROWS,
) -> Unseen:
    """Leave out the test pairs of a task that are also training pairs, its own or a source's.

    Case and full stops do not count, as in scores. A task that loses an evaluated pair is written to a folder of `out`.

    Args:
      path: the task's file or folder.
      trained: pairs of each source, from `trained_pairs`.
      out: folder of the tasks that lose pairs.
      train_rows: rows to learn from.

    Raises:
      ValueError: one source has more than 5 % of the test pairs, or fewer than 75 pairs are left of a file.
    """
    load(path, train_rows)
    task = load_task(path, train_rows=train_rows)
    pairs = [*map(pair, task.test)]
    for source, share in shares(task, trained).items():
        if share > MOST_SHARED:
            raise ValueError(
                f"{task.name} is not unseen: {share:.0%} of its test pairs are training pairs of {source}, ignoring "
                f"case, and at most {MOST_SHARED:.0%} may be: leave out the task (--unseen) or the adapter (--adapters)"
            )
    known = set(map(pair, task.train)).union(*trained.values())
    kept = [
        example
        for example, pair in zip(task.test, pairs, strict=True)
        if pair not in known
    ]
    if path.is_file() and len(kept) < LEAST_TEST_ROWS:
        raise ValueError(
            f"{path}: {len(pairs) - len(kept)} of {len(pairs)} test pairs are training pairs, ignoring case: expected "
            f"at least {LEAST_TEST_ROWS} others to test on"
        )
    left_out = sum(pair in known for pair in pairs[:EVALUATED_ROWS])
    if not left_out:
        return Unseen(path, 0)
    return Unseen(write_task(out / task.name, train=task.train, test=kept), left_out)


def write_task(folder: Path, *, before: str = "", **parts: Iterable[Example]) -> Path:
    """Write the parts of a task with a text before every input, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        lines = [
            json.dumps({"input": before + row.input, "target": row.target}) + "\n"
            for row in rows
        ]
        write_text(folder / f"{part}.jsonl", "".join(lines))
    return folder


def shares(task: Task, trained: Mapping[str, set[tuple[str, str]]]) -> dict[str, float]:
    """Return the share of a task's test pairs that each source was trained on."""
    pairs = [*map(pair, task.test)]
    return {
        source: sum(pair in rows for pair in pairs) / len(pairs)
        for source, rows in trained.items()
    }


def test_batch(setup: Setup) -> Batch:
    """Return the test rows, leaves [seeds, rows, ...]."""
    rows = np.tile(
        np.arange(len(setup.test), dtype=np.int32), (setup.problem.index.shape[0], 1)
    )
    orders = batch_orders(rows, batch_size=len(setup.test))
    return next(train_batches(setup.test, orders, pad_id=setup.tokenizer.pad_token_id))


def test_losses(setup: Setup, params: Params) -> list[float]:
    """Return the loss of each seed on the test rows, in nats per token."""
    batch = test_batch(setup)
    return jax.device_get(
        seed_entropies(params, batch, setup.problem.read(LOSS, 0))
    ).tolist()


def pair(example: Example) -> tuple[str, str]:
    """Return input and answer as scores compare answers."""
    return example.input.strip().lower(), example.target.strip().lower().replace(
        ".", ""
    )


def load(path: Path, train_rows: int = TRAIN_ROWS) -> Task:
    """Read a task with the prompt of all of them.

    Raises:
      ValueError: fewer than 75 rows are left to test on.
    """
    task = load_task(path, prompt=PROMPT, train_rows=train_rows)
    if path.is_file() and len(task.test) < LEAST_TEST_ROWS:
        raise ValueError(
            f"{path} has {train_rows + len(task.test)} different inputs, and {len(task.test)} of them to test on when "
            f"{train_rows} train: expected at least {LEAST_TEST_ROWS} to test on"
        )
    return task


def source_rows(path: Path) -> int:
    """Return how many rows of a source train its adapter: the most that leave 200 to test on, but at least 100."""
    if path.is_dir():
        rows = len(load_task(path, need=("train",)).train)
    else:
        rows = len(load_task(path, train_rows=0, need=("test",)).test) - TEST_ROWS
    return next((count for count in SOURCE_ROWS if count <= rows), min(SOURCE_ROWS))
